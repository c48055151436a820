"""What is read from a model: priors in every wrapping, and why a site stays whole."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_bmr as bmr

NORMAL_AT_ZERO = -0.5 * math.log(2 * math.pi)


def reduced(model, *args, **options):
    guide = AutoNormal(model)
    guide(*args)
    return bmr.reduce(guide, **options)


def log_prior(model):
    """Back from ΔF to ln p(0), by the location and scale that AutoNormal starts with."""
    result = reduced(model, select=lambda scores: dict(scores.kept))
    (name,) = result.scores
    (part,) = result.guide.parts
    marginal = part.factor().marginals()[name]
    log_posterior = dist.Normal(marginal.loc, marginal.scale).log_prob(torch.tensor(0.0))
    return result.scores[name] + log_posterior


def in_plates():
    with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
        pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))


def in_a_broadcasting_plate():
    with pyro.plate("a", 5):
        pyro.sample("w", dist.Normal(0.0, 1.0))


NORMALS = {
    "scalar": lambda: pyro.sample("w", dist.Normal(0.0, 1.0)),
    "expand": lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2)),
    "expand_by": lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand_by([3]).to_event(1)),
    "full": lambda: pyro.sample("w", dist.Normal(torch.zeros(3, 2), torch.ones(2)).to_event()),
    "nested": lambda: pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1).to_event(1)),
    "independent": lambda: pyro.sample(
        "w", dist.Independent(dist.Normal(torch.zeros(3), torch.ones(3)), 1)
    ),
    "expanded": lambda: pyro.sample(
        "w", dist.ExpandedDistribution(dist.Normal(0.0, 1.0), [3]).to_event(1)
    ),
    "masked by True": lambda: pyro.sample(
        "w", dist.Normal(torch.zeros(3), 1.0).mask(True).to_event()
    ),
    "plates": in_plates,
    "broadcast": in_a_broadcasting_plate,
}


@pytest.mark.parametrize("model", NORMALS.values(), ids=NORMALS)
def test_a_normal_prior_is_read_in_every_wrapping(model):
    found = log_prior(model)
    shape = poutine.trace(model).get_trace().nodes["w"]["value"].shape
    torch.testing.assert_close(found, torch.full(shape, NORMAL_AT_ZERO), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])),
        dist.Laplace(torch.tensor([0.5, -1.0, 2.0]), 0.7),
        dist.StudentT(4.0, torch.tensor([0.5, -1.0, 2.0]), 0.7),
        dist.Cauchy(torch.tensor([0.5, -1.0, 2.0]), 0.7),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_every_registered_family_is_read(prior):
    found = log_prior(lambda: pyro.sample("w", prior.to_event(1)))
    torch.testing.assert_close(found, prior.log_prob(torch.tensor(0.0)), rtol=0, atol=2e-4)


MASK = torch.tensor([True, False, True])


def masked_distribution():
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).mask(MASK).to_event(1))


def masked_outside():
    with pyro.plate("a", 3):
        pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1).mask(MASK))


def masked_by_handler():
    with pyro.plate("a", 3), poutine.mask(mask=MASK):
        pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))


@pytest.mark.parametrize("model", [masked_distribution, masked_outside, masked_by_handler])
def test_an_element_without_a_prior_is_kept_and_counted(model):
    result = reduced(model, select=lambda s: {"w": s.delta_f["w"] == math.inf})
    hidden = ~MASK if result.masks["w"].dim() == 1 else (~MASK)[:, None].expand(3, 2)
    assert torch.equal(result.scores["w"].isinf(), hidden)
    assert torch.equal(result.masks["w"], hidden)
    assert f"{int(hidden.sum())} without a prior, kept" in result.summary().loc["w", "note"]
    everything = {"w": torch.zeros_like(hidden)}
    with pytest.raises(ValueError, match="cannot go: .* without a prior"):
        reduced(model, select=lambda s: everything)
    for baseline in (bmr.baselines.snr(1.0), bmr.baselines.random(1.0), bmr.top_k(0)):
        assert torch.equal(reduced(model, select=baseline).masks["w"], hidden)


def test_a_sub_sampling_plate_has_all_its_rows():
    data = torch.randn(40, 3)

    def model():
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 40, subsample_size=8) as index:
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(w + bias, 1.0).to_event(1), obs=data[index])

    result = reduced(model, select=lambda s: {"w": torch.rand(40, 3) < 0.5, "bias": s.kept["bias"]})
    assert result.scores["w"].shape == result.masks["w"].shape == (40, 3)
    assert result.summary().loc["w", "total"] == 120
    for _ in range(5):
        trace = poutine.trace(result.guide).get_trace()
        rows = trace.nodes["rows"]["value"]
        drawn = trace.nodes["w"]["value"]
        assert drawn.shape == (8, 3)
        assert torch.equal(drawn == 0, ~result.masks["w"][rows])
        replayed = poutine.trace(poutine.replay(result.model, trace)).get_trace()
        replayed.compute_log_prob()
        assert replayed.nodes["w"]["scale"] == 5
        expected = dist.Normal(0.0, 2.0).log_prob(drawn)[result.masks["w"][rows]].sum() * 5
        torch.testing.assert_close(replayed.nodes["w"]["log_prob_sum"], expected)


class LearnablePriorScale(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.w = PyroSample(lambda self: dist.Normal(0.0, self.scale).expand([3]).to_event(1))
        self.v = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        return self.w.sum() + self.v


def learnable_param():
    scale = pyro.param("prior_scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(0.0, scale))


RAW = nn.Parameter(torch.tensor(0.3))


def closed_over_parameter():
    pyro.sample("w", dist.Normal(0.0, RAW.exp()))


def hierarchical():
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    pyro.sample("w", dist.Normal(torch.zeros(3), tau).to_event(1))


def written_in_place():
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    scale = torch.ones(4)
    scale[:2] = tau
    pyro.sample("w", dist.Normal(torch.zeros(4), scale).to_event(1))


def masked_by_a_site():
    tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
    with poutine.mask(mask=tau > -10):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def scaled():
    with poutine.scale(scale=0.1):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def hidden_by_a_mask():
    with poutine.mask(mask=False):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def unregistered():
    pyro.sample("w", dist.Gumbel(0.0, 1.0))


def correlated_prior_of_a_site():
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), tau * torch.eye(3)))


WHOLE = {
    "positive": (lambda: pyro.sample("w", dist.Gamma(1.0, 1.0)), "it is positive"),
    "interval": (lambda: pyro.sample("w", dist.Uniform(-1.0, 1.0)), "constrained to Interval"),
    "simplex": (lambda: pyro.sample("w", dist.Dirichlet(torch.ones(3))), "constrained to Simplex"),
    "mask from a site": (masked_by_a_site, "depends on 'tau'"),
    "scaled": (scaled, "poutine.scale"),
    "masked out": (hidden_by_a_mask, "masked out"),
    "unregistered": (unregistered, "Gumbel, whose density at zero is not registered"),
    "correlated": (correlated_prior_of_a_site, "correlated, and depends on 'tau'"),
}


@pytest.mark.parametrize(("model", "reason"), WHOLE.values(), ids=WHOLE)
@pytest.mark.filterwarnings("ignore:no site")
def test_a_site_that_cannot_be_reduced_stays_whole_with_its_reason(model, reason):
    result = reduced(model)
    assert "w" not in result.masks
    assert result.summary().loc["w", "note"].startswith("not reduced: ")
    assert reason in result.summary().loc["w", "note"]
    assert "not reduced: " in str(result)
    assert set(result.guide()) >= {"w"}
    with pytest.raises(ValueError, match="cannot be reduced: 'w'"):
        reduced(model, sites=["w"])


def test_a_discrete_site_that_is_hidden_from_the_guide_is_listed():
    @config_enumerate
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 7):
            z = pyro.sample("z", dist.Bernoulli(0.5).expand([7, 2]).to_event(1))
            pyro.sample("y", dist.Normal(w + z[:, 0], 1.0), obs=torch.zeros(7))

    result = reduced(poutine.block(model, hide=["z"]))
    row = result.summary().loc["z"]
    assert (row["shape"], row["total"], row["kept"]) == ((7, 2), 0, 0)
    assert "│ z    │ 7 × 2 │       │      │" in str(result)
    assert result.summary().loc["z", "note"] == "not reduced: it is discrete"
    assert set(result.masks) == {"w"}
    assert result.sparsity in {0.0, 1.0}, "only what the guide holds counts"
    assert "z" in poutine.trace(result.model).get_trace().nodes


def test_a_family_can_be_registered():
    class Gumbelish(dist.Gumbel):
        pass

    def model():
        pyro.sample("w", Gumbelish(0.0, 1.0))

    @bmr.extend.log_density_at_zero.register
    def _(prior: Gumbelish):
        return prior.log_prob(torch.zeros(()))

    torch.testing.assert_close(log_prior(model), torch.tensor(-1.0), rtol=0, atol=1e-5)


def test_a_registered_density_that_is_no_density_stays_whole():
    class Broken(dist.Gumbel):
        pass

    bmr.extend.log_density_at_zero.register(Broken)(lambda prior: torch.tensor(math.nan))
    with pytest.warns(UserWarning, match="0 or not a number"):
        reduced(lambda: pyro.sample("w", Broken(0.0, 1.0)))
