"""The laws of a Reduction, for factors of a non-negative factorisation that are set to zero."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from pyro_bmr.guides.reading import read_guide

SITES = ["W", "H"]
KEPT = torch.tensor([True, False, True])


def model(y):
    """Three factors of six rows and four columns, in a plate and in an event."""
    rows, columns = pyro.plate("rows", 6, dim=-2), pyro.plate("factors", 3, dim=-1)
    with rows, columns:
        w = pyro.sample("W", dist.Gamma(0.7, 1.0))
    h = pyro.sample("H", dist.HalfNormal(torch.ones(3, 4)).to_event(2))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(w @ h, scale).to_event(2), obs=y)


def start(site):
    generator = torch.Generator().manual_seed(len(site["name"]) + site["fn"].shape().numel())
    return 0.5 + torch.rand(site["fn"].shape(), generator=generator)


GUIDES = {
    "AutoNormal": lambda: AutoNormal(model, init_loc_fn=start, init_scale=0.2),
    "AutoGamma": lambda: bmr.mean_field(model, gamma=SITES, init_loc_fn=start, init_scale=0.2),
    "one of each": lambda: bmr.mean_field(model, gamma=["W"], init_loc_fn=start, init_scale=0.2),
}


@pytest.fixture(params=GUIDES)
def guide(request):
    pyro.set_rng_seed(1)
    made = GUIDES[request.param]()
    made(y())
    return made


def y():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(6, 4, generator=generator)


def groups(name, shape):  # noqa: ARG001
    return torch.arange(3)[:, None] if name == "H" else torch.arange(3)


def drop(kept):
    return lambda scores: {next(iter(scores.delta_f)): kept}


def reduce(guide, kept=KEPT):
    return bmr.reduce(guide, y(), sites=SITES, groups=groups, select=drop(kept))


def is_dropped(kept=KEPT):
    return {"W": ~kept.expand(6, 3), "H": ~kept[:, None].expand(3, 4)}


def assert_zero(values, kept=KEPT):
    for name, gone in is_dropped(kept).items():
        assert (values[name].masked_select(gone) == 0).all()
        assert (values[name].masked_select(~gone) > 0).all()


def test_law_1_pruned_elements_are_zero_in_every_draw(guide):
    result = reduce(guide)
    for name, gone in is_dropped().items():
        assert torch.equal(result.masks[name], ~gone)
    assert_zero(result.guide(y()))
    assert_zero(result.guide.median())
    assert_zero(result.guide.quantiles([0.1, 0.9]))
    assert_zero(Predictive(result.guide, num_samples=5)(y()))
    prior = poutine.trace(result.model).get_trace(y()).nodes
    assert_zero({name: prior[name]["value"] for name in SITES})
    full = poutine.trace(guide).get_trace(y())
    replayed = poutine.trace(poutine.replay(result.model, full)).get_trace(y()).nodes
    w, h = (full.nodes[name]["value"] for name in SITES)
    expected = w[:, KEPT] @ h[KEPT]
    torch.testing.assert_close(replayed["y"]["fn"].base_dist.loc, expected)
    draws = Predictive(result.model, guide=result.guide, num_samples=5)(y())
    assert draws["y"].shape[-2:] == (6, 4)


def test_law_2_pruned_elements_add_nothing_to_the_free_energy(guide):
    result = reduce(guide)
    for _ in range(3):
        guide_trace = poutine.trace(result.guide).get_trace(y())
        model_trace = poutine.trace(poutine.replay(result.model, guide_trace)).get_trace(y())
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
        priors = {"W": dist.Gamma(0.7, 1.0), "H": dist.HalfNormal(1.0)}
        for name, gone in is_dropped().items():
            left = priors[name].log_prob(guide_trace.nodes[name]["value"][~gone]).sum()
            torch.testing.assert_close(model_trace.nodes[name]["log_prob_sum"], left)
        posterior = sum(
            node["log_prob_sum"] for name, node in guide_trace.nodes.items() if name[0] in "WH"
        )
        torch.testing.assert_close(posterior, log_posterior_of_kept(guide, guide_trace))


def log_posterior_of_kept(guide, trace):
    total = 0.0
    for factor in read_guide(guide):
        name = factor.sites[0].name
        if name not in SITES:
            continue
        left = ~is_dropped()[name]
        if isinstance(factor, bmr.extend.IndependentFactor):
            marginal = factor.marginals()[name]
            fn = dist.LogNormal(marginal.loc[left], marginal.scale[left])
        else:
            alpha = factor.concentration[left]
            fn = dist.Gamma(alpha, alpha / factor.mean[left])
        total = total + fn.log_prob(trace.nodes[name]["value"][left]).sum()
    return total


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(), bmr.GlobalELBO()])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_law_3_no_gradient_brings_a_pruned_element_back(guide, loss, weight_decay):
    result = reduce(guide)
    before = result.guide.median()
    optim = pyro.optim.Adam({"lr": 0.02, "weight_decay": weight_decay})
    svi = SVI(result.model, result.guide, optim, loss)
    losses = [svi.step(y()) for _ in range(15)]
    assert torch.tensor(losses).isfinite().all()
    after = result.guide.median()
    assert_zero(after)
    assert_zero(result.guide(y()))
    for name, gone in is_dropped().items():
        assert (after[name][~gone] != before[name][~gone]).all()
    assert all(t.isfinite().all() for t in result.guide.parameters())


def test_law_4_reductions_compose(guide):
    first, second = torch.tensor([False, True, True]), torch.tensor([True, True, False])
    one = reduce(guide, first)
    two = reduce(one.guide, second)
    both = reduce(guide, first & second)
    assert one.delta_f + two.delta_f == pytest.approx(both.delta_f, rel=1e-4)
    assert_zero(two.guide.median(), first & second)
    for name, median in both.guide.median().items():
        torch.testing.assert_close(two.guide.median()[name], median)
    unchanged = bmr.reduce(two.guide, y(), sites=SITES, select=lambda scores: dict(scores.kept))
    assert (unchanged.delta_f, unchanged.sparsity) == (0, two.sparsity)
    # Other sites are reduced beside what was set to zero before.
    assert_zero(bmr.reduce(two.guide, y(), sites="scale").guide.median(), first & second)


def test_law_5_the_guide_is_left_as_it_was(guide):
    before = {name: t.clone() for name, t in guide.state_dict().items()}
    random = torch.get_rng_state()
    result = bmr.reduce(guide, y(), sites=SITES, groups=groups)
    print(result)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in guide.state_dict().items())


def test_law_6_copies_states_and_files(guide, tmp_path):
    result = reduce(guide)
    copied = copy.deepcopy(result)
    svi = SVI(result.model, result.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step(y())
    torch.save(copied.guide.state_dict(), tmp_path / "guide.pt")
    assert (copied.guide.median()["W"] != result.guide.median()["W"]).any()
    result.guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    result.save(tmp_path / "result.safetensors", y())
    loaded = bmr.load(tmp_path / "result.safetensors", model)
    for other in (copied, loaded):
        assert_zero(other.guide(y()))
        for name, median in result.guide.median().items():
            assert torch.equal(other.guide.median()[name], median)
        pyro.set_rng_seed(0)
        expected = Trace_ELBO().loss(result.model, result.guide, y())
        pyro.set_rng_seed(0)
        assert Trace_ELBO().loss(other.model, other.guide, y()) == pytest.approx(expected)
        assert_zero(reduce(other.guide).guide.median())


def test_law_7_the_free_energy_does_not_rise(guide):
    result = bmr.reduce(guide, y(), sites=SITES, groups=groups)
    assert result.realised <= 2 * result.realised_error
    full = bmr.free_energy(model, guide, y(), num_samples=300)
    reduced = bmr.free_energy(result.model, result.guide, y(), num_samples=300)
    error = math.hypot(full[1], reduced[1], result.realised_error)
    assert reduced[0] - full[0] == pytest.approx(result.realised, abs=4 * error + 1e-3)


def test_arviz_and_compaction(guide):
    result = reduce(guide)
    posterior = result.to_arviz(y(), num_samples=20).posterior
    assert (posterior["W"].values[..., 1] == 0).all()
    assert (posterior["W"].values[..., 0] > 0).all()
    small = result.compact(y())
    assert small.guide(y())["W"].shape[0] == 6
