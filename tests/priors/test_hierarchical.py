"""Priors that depend on other sites, on parameters, and in unconstrained coordinates."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_bmr as bmr
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.priors.families import UnregisteredPriorError
from pyro_bmr.priors.site_priors import read_priors
from pyro_bmr.testing import check_guide_family

ONE = torch.ones((), dtype=torch.float64)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def log_normal(loc, scale):
    """ln N(0 | loc, scale)."""
    return -0.5 * math.log(2 * math.pi) - np.log(scale) - 0.5 * (loc / scale) ** 2


def trained(model, family=AutoNormal, args=(), **values):
    """A guide at the given (loc, scale) of each site, in unconstrained coordinates."""
    guide = family(model)
    guide(*args)
    for name, (loc, scale) in values.items():
        getattr(guide.locs, name).data.copy_(torch.as_tensor(loc))
        setattr(guide.scales, name, torch.as_tensor(scale).expand(getattr(guide.locs, name).shape))
    return guide


def priors_of(model, guide, args=(), **options):
    return read_priors(model, args, {}, read_guide(guide), **options)[0]


def everything(scores):
    return dict(scores.kept)


PARENTS = {
    "HalfCauchy scale": (dist.HalfCauchy(ONE), lambda s: s),
    "HalfNormal scale": (dist.HalfNormal(ONE), lambda s: s),
    "LogNormal scale": (dist.LogNormal(0 * ONE, ONE), lambda s: s),
    "Gamma precision": (dist.Gamma(2 * ONE, ONE), lambda s: s**-0.5),
    "InverseGamma variance": (dist.InverseGamma(2 * ONE, ONE), lambda s: s**0.5),
}


@pytest.mark.parametrize(("parent", "to_scale"), PARENTS.values(), ids=PARENTS)
def test_ard_priors_are_expected_in_closed_form(parent, to_scale):
    def model():
        s = pyro.sample("s", parent.expand([3]).to_event(1))
        pyro.sample(
            "w", dist.Normal(torch.tensor([0.0, 0.5, -1.0]).double(), to_scale(s)).to_event(1)
        )

    loc, scale = [-1.0, 0.3, 2.0], [0.2, 0.5, 1.0]
    prior = priors_of(model, trained(model, s=(loc, torch.tensor(scale))))["w"]
    natural = prior.gaussian.natural()
    for i, mean in enumerate([0.0, 0.5, -1.0]):
        s = to_scale(np.exp(loc[i] + scale[i] * NODES))
        expected = (WEIGHTS * log_normal(mean, s)).sum()
        precision = (WEIGHTS / s**2).sum()
        assert prior.log_density_at_zero[i].item() == pytest.approx(expected, rel=1e-5)
        assert natural.precision[i].item() == pytest.approx(precision, rel=1e-5)
        assert natural.linear[i].item() == pytest.approx(mean * precision, rel=1e-5)
    assert prior.note == ""


def horseshoe():
    tau = pyro.sample("tau", dist.HalfCauchy(ONE))
    lam = pyro.sample("lam", dist.HalfCauchy(ONE).expand([40]).to_event(1))
    pyro.sample("w", dist.Normal(torch.zeros(40).double(), tau * lam).to_event(1))


def test_a_horseshoe_is_expected_in_closed_form():
    """ln s = ln tau + ln lam, so that means and variances add up."""
    loc, scale = torch.randn(40).double(), 0.1 + torch.rand(40).double()
    guide = trained(horseshoe, tau=(-2.0, 0.4), lam=(loc, scale))
    prior = priors_of(horseshoe, guide)["w"]
    expected = -0.5 * math.log(2 * math.pi) - (loc - 2.0)
    torch.testing.assert_close(prior.log_density_at_zero, expected, rtol=0, atol=1e-6)
    precision = (-2 * (loc - 2.0) + 2 * (scale.square() + 0.4**2)).exp()
    torch.testing.assert_close(prior.gaussian.natural().precision, precision, rtol=1e-6, atol=0)
    assert (prior.gaussian.natural().linear == 0).all()


def test_a_mean_and_a_scale_that_are_both_sampled_are_expected_in_closed_form():
    def model():
        m = pyro.sample("m", dist.Normal(0 * ONE, ONE))
        s = pyro.sample("s", dist.HalfNormal(ONE))
        pyro.sample("w", dist.Normal(m, s).expand([2]).to_event(1))

    prior = priors_of(model, trained(model, m=(0.4, 0.3), s=(-0.5, 0.6)))["w"]
    m, s = 0.4 + 0.3 * NODES[:, None], np.exp(-0.5 + 0.6 * NODES[None])
    weights = WEIGHTS[:, None] * WEIGHTS
    density = prior.log_density_at_zero
    assert density[0].item() == pytest.approx((weights * log_normal(m, s)).sum(), rel=1e-5)
    natural = prior.gaussian.natural()
    assert natural.precision[0].item() == pytest.approx((weights / s**2).sum(), rel=1e-5)
    assert natural.linear[0].item() == pytest.approx((weights * m / s**2).sum(), rel=1e-5)
    # The normalised effective Gaussian is another thing.
    effective = dist.Normal(prior.gaussian.loc, prior.gaussian.scale).log_prob(0 * ONE)
    assert abs(effective[0] - density[0]) > 0.1


def regularised_horseshoe():
    """Piironen & Vehtari (2017), eq. 2.8."""
    tau = pyro.sample("tau", dist.HalfCauchy(ONE))
    slab = pyro.sample("slab", dist.InverseGamma(2 * ONE, ONE))
    lam = pyro.sample("lam", dist.HalfCauchy(ONE).expand([40]).to_event(1))
    variance = (tau * lam).square()
    scale = (slab * variance / (slab + variance)).sqrt()
    pyro.sample("w", dist.Normal(torch.zeros(40).double(), scale).to_event(1))


def laplace():
    """A scale mixture whose expectation is not that of anything Gaussian."""
    loc = pyro.sample("m", dist.Normal(0 * ONE, ONE))
    scale = pyro.sample("s", dist.HalfCauchy(ONE).expand([40]).to_event(1))
    pyro.sample("w", dist.Laplace(loc, scale).to_event(1))


def draw_unconstrained(guide, count):
    if isinstance(guide, AutoNormal):
        (loc, scale) = guide.locs, guide.scales
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        fns = {n: dist.Normal(getattr(loc, n), getattr(scale, n)) for n in names}
        draws = {name: fn.sample((count,)) for name, fn in fns.items()}
    else:
        joint = guide.get_posterior().sample((count,))
        shapes = guide._unconstrained_shapes
        parts = joint.split([shape.numel() for shape in shapes.values()], -1)
        draws = dict(zip(shapes, parts, strict=True))
    return {name: value.reshape(count, -1).detach() for name, value in draws.items()}


@pytest.mark.parametrize(
    "family", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
@pytest.mark.parametrize("model", [horseshoe, regularised_horseshoe, laplace])
def test_an_expected_prior_agrees_with_draws_of_the_guide(model, family):
    guide = family(model, init_scale=0.4)
    guide()
    if family is AutoMultivariateNormal:
        tril = torch.eye(len(guide.loc)) + 0.05 * torch.randn(len(guide.loc), len(guide.loc)).tril(
            -1
        )
        guide.scale_tril = tril.double()
    prior = priors_of(model, guide)["w"]
    draws = draw_unconstrained(guide, 20_000)
    if model is laplace:
        density = dist.Laplace(draws["m"], draws["s"].exp()).log_prob(0 * ONE)
    else:
        scale = (draws["tau"] + draws["lam"]).exp()
        if model is regularised_horseshoe:
            slab = draws["slab"].exp()
            scale = (slab * scale**2 / (slab + scale**2)).sqrt()
        density = dist.Normal(0 * ONE, scale).log_prob(0 * ONE)
    found = prior.log_density_at_zero - density.mean(0)
    assert found.abs().max() < (0.15 if model is laplace else 0.04)
    assert found.square().mean().sqrt() < (0.06 if model is laplace else 0.02)
    if prior.gaussian is not None:
        precision = scale.pow(-2).mean(0)
        error = prior.gaussian.natural().precision / precision - 1
        assert error.square().mean().sqrt() < 0.15


def test_correlated_parents_are_drawn_together():
    """In a horseshoe ln s = u + v, whose variance holds their covariance."""

    def model():
        u = pyro.sample("u", dist.LogNormal(0 * ONE, ONE))
        v = pyro.sample("v", dist.LogNormal(0 * ONE, ONE))
        pyro.sample("w", dist.Normal(u, u * v))

    guide = AutoMultivariateNormal(model)
    guide()
    covariance = torch.tensor([[0.25, -0.15, 0.1], [-0.15, 0.16, 0.0], [0.1, 0.0, 0.3]]).double()
    tril = torch.linalg.cholesky(covariance)
    guide.scale = tril.diagonal()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    guide.loc.data.copy_(torch.tensor([0.2, -0.3, 0.0]))
    prior = priors_of(model, guide)["w"]
    variance = 0.25 + 0.16 - 2 * 0.15
    precision = math.exp(-2 * (0.2 - 0.3) + 2 * variance)
    assert prior.gaussian.natural().precision.item() == pytest.approx(precision, rel=1e-6)
    draws = torch.distributions.MultivariateNormal(guide.loc, covariance).sample((200_000,))
    u, v = draws[:, 0].exp(), draws[:, 1].exp()
    density = dist.Normal(u, u * v).log_prob(0 * ONE)
    error = density.std() / len(density) ** 0.5
    assert abs(prior.log_density_at_zero - density.mean()) < max(5 * error.item(), 0.15)


def test_gamma_posteriors_are_drawn_with_their_exact_logarithm():
    def model():
        precision = pyro.sample("precision", dist.Gamma(ONE, ONE).expand([3]).to_event(1))
        pyro.sample("w", dist.Normal(0 * ONE, precision.rsqrt()).to_event(1))

    guide = bmr.mean_field(model, gamma=["precision"])
    guide()
    concentration, mean = (
        torch.tensor([0.3, 2.0, 30.0]).double(),
        torch.tensor([0.5, 1.0, 4.0]).double(),
    )
    guide[1].concentrations.precision, guide[1].means.precision = concentration, mean
    prior = priors_of(model, guide)["w"]
    expected = 0.5 * (
        concentration.digamma() - (concentration / mean).log() - math.log(2 * math.pi)
    )
    torch.testing.assert_close(prior.log_density_at_zero, expected, rtol=0, atol=1e-6)
    precision = prior.gaussian.natural().precision
    torch.testing.assert_close(precision[1:], mean[1:], rtol=0.1, atol=0)


class Conjugate:
    """Orthogonal inputs and a shared scale: mean-field is exact given q(s), and ΔF adds up."""

    def __init__(self):
        x, _ = torch.linalg.qr(torch.randn(20, 6).double())
        self.x = x * torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
        self.y = self.x @ torch.tensor([0.1, 0.1, 0.1, 2.0, 1.0, 1.0]).double()
        self.y = self.y + 0.5 * torch.randn(20).double()

    def model(self):
        s = pyro.sample("s", dist.HalfCauchy(ONE))
        w = pyro.sample("w", dist.Normal(torch.zeros(6).double(), s[..., None]).to_event(1))
        pyro.sample(
            "y", dist.Normal((self.x * w[..., None, :]).sum(-1), 0.5).to_event(1), obs=self.y
        )

    def guide(self, loc, scale):
        precision = self.x.square().sum(0) / 0.25 + math.exp(-2 * loc + 2 * scale**2)
        mean = self.x.mT @ self.y / 0.25 / precision
        return trained(self.model, s=(loc, scale), w=(mean, precision.rsqrt()))


def test_delta_f_is_what_the_free_energy_changes_by():
    problem = Conjugate()
    guide = problem.guide(-0.3, 0.25)
    elbo = Trace_ELBO(num_particles=40_000, vectorize_particles=True, max_plate_nesting=0)
    for mask in ([0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6):
        keep = torch.tensor(mask, dtype=torch.bool)
        result = bmr.reduce(guide, select=lambda scores, keep=keep: {"w": keep})
        losses = []
        for program in ((result.model, result.guide), (problem.model, guide)):
            pyro.set_rng_seed(1)
            losses.append(elbo.loss(*program))
        assert losses[0] - losses[1] == pytest.approx(result.delta_f, abs=0.06)
    assert abs(result.delta_f) > 1


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_two_steps_add_up_to_one_or_it_is_noted_that_they_do_not(family):
    def ard():
        tau = pyro.sample("tau", dist.LogNormal(0 * ONE, ONE))
        w = pyro.sample("w", dist.Normal(0.0, tau).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(w, ONE).to_event(1), obs=torch.tensor([2, 0.1, 0.3]).double())

    def keep(*kept):
        return lambda _: {"w": torch.tensor(kept)}

    torch.manual_seed(0)
    guide = family(ard)
    guide()
    if family is AutoMultivariateNormal:
        guide.loc.data.copy_(torch.tensor([0.2, 1.5, -0.8, 0.5]))
        guide.scale_tril = torch.eye(4).double() + 0.5 * torch.randn(4, 4).double().tril(-1)
    first = bmr.reduce(guide, select=keep(True, False, True))
    second = bmr.reduce(first.guide, select=keep(True, False, False))
    once = bmr.reduce(guide, select=keep(True, False, False))
    # The prior at zero is -ln tau and a constant, and the first step moves ln tau.
    moved = second.decision.factors[0].locations()["tau"] - read_guide(guide)[0].locations()["tau"]
    difference = first.delta_f + second.delta_f - once.delta_f
    assert difference == pytest.approx(-float(moved), abs=1e-6)
    note = once.summary().loc["w", "note"]
    if family is AutoNormal:
        assert (difference, note) == (pytest.approx(0, abs=1e-6), "")
        return
    assert abs(difference) > 0.01
    assert note == "ΔF averages the prior over 'tau': reduce in one call, not in two"
    nothing = bmr.reduce(once.guide, select=keep(True, False, False))
    assert (nothing.delta_f, nothing.summary().loc["w", "note"]) == (0, "")
    for one, other in zip(read_guide(second.guide), read_guide(once.guide), strict=True):
        torch.testing.assert_close(one.posterior.loc, other.posterior.loc)


def test_delta_f_bounds_what_refitting_reaches():
    """The scale is free to move when coefficients are gone."""
    problem = Conjugate()
    guide = problem.guide(-0.3, 0.25)
    keep = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    result = bmr.reduce(guide, select=lambda scores: {"w": keep})
    elbo = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(result.model, result.guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(200):
        svi.step()
    exact = Trace_ELBO(num_particles=40_000, vectorize_particles=True, max_plate_nesting=0)
    after = exact.loss(result.model, result.guide) - exact.loss(problem.model, guide)
    assert after < result.delta_f - 0.5


def hierarchical_mean():
    m = pyro.sample("m", dist.Normal(0 * ONE, ONE))
    s = pyro.sample("s", dist.LogNormal(0 * ONE, ONE))
    w = pyro.sample("w", dist.Normal(m, s).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=torch.tensor([0.1, -0.1, 0.0]).double())


def test_a_parent_of_a_reduced_site_stays_whole_unless_it_is_named_alone():
    guide = AutoNormal(hierarchical_mean)
    guide()
    result = bmr.reduce(guide)
    assert set(result.scores) == {"w"}
    notes = result.summary()["note"]
    assert notes["m"] == ("not reduced: the prior of 'w' depends on it; sites= may name it instead")
    assert "it is positive, and 0 is not; Spike(loc=...) names a value that is" in notes["s"]
    caption = " ".join(str(result).split())
    assert "the lower level was reduced, 'w'; the level above it was left, 'm'" in caption
    assert "sites=['m'] reduces that instead" in caption
    instead = bmr.reduce(guide, sites=["m"])
    assert set(instead.scores) == {"m"}
    assert "not among sites=" in instead.summary().loc["w", "note"]
    assert "level" not in str(instead)
    marginal = read_guide(guide)[0].marginals()["m"]
    posterior = dist.Normal(marginal.loc, marginal.scale).log_prob(0 * ONE)
    expected = -0.5 * math.log(2 * math.pi) - posterior
    torch.testing.assert_close(instead.scores["m"], expected)
    for both, spike in ((["m", "w"], bmr.Spike()), (["s", "w"], bmr.Spike(loc=1.0))):
        with pytest.raises(ValueError, match="whose prior depends on it"):
            bmr.reduce(guide, sites=both, reduced_prior=spike)


def test_the_copy_of_a_reduction_is_reduced_alike():
    guide = AutoNormal(hierarchical_mean)
    guide()
    result = bmr.reduce(guide, select=lambda s: {"w": torch.tensor([True, True, False])})
    again = bmr.reduce(copy.deepcopy(result).guide)
    assert set(again.scores) == {"w"}
    torch.testing.assert_close(again.scores["w"][:2], result.scores["w"][:2])
    assert "it is positive, and 0 is not" in again.summary().loc["s", "note"]


def test_a_grandparent_is_reduced_with_its_grandchildren():
    def model():
        a = pyro.sample("a", dist.Normal(0 * ONE, ONE))
        b = pyro.sample("b", dist.Normal(a, ONE))
        pyro.sample("c", dist.Normal(b, ONE))

    guide = AutoNormal(model)
    guide()
    assert set(bmr.reduce(guide).scores) == {"a", "c"}


class Learnable(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(0.4 * ONE, dist.constraints.positive)
        self.w = PyroSample(lambda self: dist.Normal(0 * ONE, self.scale).expand([3]).to_event(1))

    def forward(self):
        return self.w


def learnable_param():
    scale = pyro.param("scale", 0.4 * ONE, constraint=dist.constraints.positive)
    pyro.sample("w", dist.Normal(0 * ONE, scale).expand([3]).to_event(1))


RAW = nn.Parameter(torch.tensor(math.log(0.4), dtype=torch.float64))


def closed_over():
    pyro.sample("w", dist.Normal(0 * ONE, RAW.exp()).expand([3]).to_event(1))


@pytest.mark.parametrize("model", [Learnable(), learnable_param, closed_over])
def test_a_learnable_scale_is_taken_as_it_is(model):
    guide = AutoNormal(model)
    guide()
    prior = priors_of(model, guide)["w"]
    assert prior.log_density_at_zero[0].item() == pytest.approx(log_normal(0, 0.4), rel=1e-6)
    result = bmr.reduce(guide, select=lambda scores: {"w": torch.tensor([True, False, False])})
    svi = SVI(result.model, result.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(20):
        svi.step()
    assert torch.equal(result.guide()["w"] == 0, torch.tensor([False, True, True]))


def test_a_learnable_scale_beside_a_sampled_one():
    def model():
        own = pyro.param("own", 0.4 * ONE, constraint=dist.constraints.positive)
        s = pyro.sample("s", dist.HalfCauchy(ONE))
        scale = torch.ones(4).double()
        scale[:2] = s  # where provenance does not follow
        pyro.sample("w", dist.Normal(torch.zeros(4).double(), own * scale).to_event(1))

    prior = priors_of(model, trained(model, s=(-1.0, 0.5)))["w"]
    expected = torch.tensor([-1.0, -1.0, 0.0, 0.0]).double() + math.log(0.4)
    expected = -0.5 * math.log(2 * math.pi) - expected
    torch.testing.assert_close(prior.log_density_at_zero, expected, rtol=0, atol=1e-6)


def test_a_prior_that_depends_on_what_the_guide_does_not_hold_stays_whole():
    def model():
        s = pyro.sample("s", dist.HalfCauchy(ONE))
        k = pyro.sample("k", dist.Bernoulli(ONE / 2))
        pyro.sample("v", dist.Normal(0 * ONE, ONE + k))
        pyro.sample("w", dist.Normal(0 * ONE, s))

    guide = AutoNormal(poutine.block(model, hide=["s", "k"]))
    guide()
    with pytest.warns(UserWarning, match="no site of this guide can be reduced"):
        notes = bmr.reduce(guide).summary()["note"]
    assert notes["w"] == "not reduced: its prior depends on 's', which the guide does not hold"
    assert notes["v"] == "not reduced: its prior depends on 'k', which the guide does not hold"


def test_a_deterministic_site_on_the_way_hides_nothing():
    def model():
        s = pyro.sample("s", dist.HalfCauchy(ONE))
        twice = pyro.deterministic("twice", 2 * s)
        pyro.sample("w", dist.Normal(0 * ONE, twice))

    prior = priors_of(model, trained(model, s=(-1.0, 0.5)))["w"]
    expected = -0.5 * math.log(2 * math.pi) + 1.0 - math.log(2)
    assert prior.log_density_at_zero.item() == pytest.approx(expected, rel=1e-6)


def test_a_sub_sampling_plate_below_a_sampled_scale():
    def model():
        s = pyro.sample("s", dist.HalfCauchy(ONE))
        with pyro.plate("rows", 30, subsample_size=5):
            w = pyro.sample("w", dist.Normal(0 * ONE, s))
            pyro.sample("y", dist.Normal(w, 1.0), obs=torch.zeros(5).double())

    guide = trained(model, s=(-1.0, 0.5))
    prior = priors_of(model, guide)["w"]
    expected = torch.tensor([-0.5 * math.log(2 * math.pi) + 1.0]).double()
    torch.testing.assert_close(prior.log_density_at_zero, expected, rtol=0, atol=1e-6)
    assert bmr.reduce(guide).scores["w"].shape == (30,)


def test_an_inexact_expectation_is_noted():
    def model():
        m = pyro.sample("m", dist.Normal(0 * ONE, ONE))
        pyro.sample("w", dist.Normal(m.square(), 0.1 * ONE))

    result = bmr.reduce(trained(model, m=(0.3, 0.5)), select=everything)
    assert "prior at zero known to ±" in result.summary().loc["w", "note"]


def test_a_reduction_of_a_hierarchical_model_leaves_no_trace_and_repeats():
    guide = trained(regularised_horseshoe)
    store, state = dict(pyro.get_param_store().items()), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    scores = [bmr.reduce(guide, select=everything).scores["w"] for _ in range(2)]
    assert torch.equal(*scores)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert pyro.get_param_store().keys() == store.keys()
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


class Mixture(dist.MixtureSameFamily):
    """Pyro's autoguides do not know the support of a mixture."""

    support = dist.constraints.real


def mixture(components, weights=(0.3, 0.7), family=Mixture):
    return family(dist.Categorical(torch.tensor(weights).double()), components)


MIXTURES = {
    "normals": mixture(dist.Normal(torch.tensor([0.0, 0.4]).double(), torch.tensor([0.1, 2.0]))),
    "a mixture an element": mixture(
        dist.Laplace(torch.zeros(3, 2).double(), torch.tensor([[0.1, 1], [0.2, 1], [0.3, 1]])),
        [[0.5, 0.5]] * 3,
    ),
}


@pytest.mark.parametrize("prior", MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_is_read(prior):
    def model():
        pyro.sample("w", prior.to_event())

    guide = trained(model)
    found = priors_of(model, guide)["w"]
    assert found.gaussian is None
    torch.testing.assert_close(found.log_density_at_zero, prior.log_prob(0 * ONE))
    result = bmr.reduce(guide, select=lambda s: {"w": torch.zeros_like(s.kept["w"])})
    assert (poutine.trace(result.model).get_trace().nodes["w"]["value"] == 0).all()
    assert (result.guide()["w"] == 0).all()


def test_a_mixture_of_vectors_stays_whole():
    normal = dist.Normal(torch.zeros(2, 3).double(), ONE).to_event(1)
    with pytest.raises(UnregisteredPriorError, match="elements depend on each other"):
        bmr.extend.log_density_at_zero(mixture(normal, family=dist.MixtureSameFamily))


class Horseshoe(dist.Normal):
    """Stands for a horseshoe whose scales are integrated out: unbounded at 0 if centred there."""


@bmr.extend.log_density_at_zero.register
def _(prior: Horseshoe):
    return torch.where(prior.loc == 0, torch.inf, prior.log_prob(0 * ONE))


def test_an_infinite_density_is_counted_and_kept():
    loc = torch.tensor([0.0, 1.0, 1.0]).double()
    mask = torch.tensor([True, True, False])

    def model():
        pyro.sample("w", Horseshoe(loc, ONE).mask(mask).to_event(1))

    result = bmr.reduce(trained(model))
    assert torch.equal(result.scores["w"].isinf(), torch.tensor([True, False, True]))
    assert result.masks["w"][[0, 2]].all()
    note = result.summary().loc["w", "note"]
    assert "1 with an infinite prior density at zero, kept" in note
    assert "1 without a prior, kept" in note
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="its prior density at zero is infinite"):
        bmr.reduce(trained(lambda: pyro.sample("w", Horseshoe(0 * ONE, ONE))))


def test_a_scale_that_reaches_zero_is_counted_and_kept():
    def model():
        s = pyro.sample("s", dist.HalfCauchy(torch.ones(2)).to_event(1))
        pyro.sample("w", dist.Normal(torch.zeros(2), s.square()).to_event(1))

    result = bmr.reduce(trained(model, s=([0.0, -60.0], 1.0)))
    assert not result.scores["w"].isnan().any()
    assert torch.equal(result.scores["w"].isinf(), torch.tensor([False, True]))
    assert "1 with an infinite prior density" in result.summary().loc["w", "note"]
    prior = priors_of(model, trained(model, s=([0.0, -60.0], 1.0)))["w"]
    assert not (prior.gaussian.loc.isnan() | prior.gaussian.scale.isnan()).any()


# Gains that multiply: log-normal prior, observed through their logarithm, so that the posterior is
# exactly Gaussian in unconstrained coordinates and the loss is the negative evidence in every draw.
MIXING = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.5], [0.2, 0.0, 1.0]]).double()
OBSERVED = torch.tensor([0.1, 1.5, -0.1]).double()


def gains(mixing=MIXING):
    with pyro.plate("gains", 3):
        g = pyro.sample("g", dist.LogNormal(torch.tensor([0.1, 0.0, -0.2]).double(), 1.2 * ONE))
    pyro.sample("y", dist.Normal(g.log() @ mixing.mT, 0.5).to_event(1), obs=OBSERVED)


def independent_gains():
    gains(torch.eye(3).double())


def posterior(mixing):
    prior_precision = torch.eye(3).double() / 1.2**2
    precision = mixing.mT @ mixing / 0.25 + prior_precision
    linear = mixing.mT @ OBSERVED / 0.25 + prior_precision @ torch.tensor([0.1, 0.0, -0.2]).double()
    covariance = precision.inverse()
    return covariance @ linear, covariance


def exact_guide(family):
    model = gains if family is AutoMultivariateNormal else independent_gains
    guide = family(model)
    guide()
    loc, covariance = posterior(MIXING if model is gains else torch.eye(3).double())
    tril = torch.linalg.cholesky(covariance)
    if family is AutoNormal:
        guide.locs.g, guide.scales.g = loc, tril.diagonal()
    elif family is AutoDiagonalNormal:
        guide.loc.data.copy_(loc)
        guide.scale = tril.diagonal()
    else:
        guide.loc.data.copy_(loc)
        guide.scale = tril.diagonal()
        guide.scale_tril = tril / tril.diagonal()[:, None]
    return model, guide


FAMILIES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal]
KEEP = torch.tensor([False, True, False])


AT_ONE = {"g": bmr.Spike(loc=1.0)}


def only_second(scores):
    return {"g": KEEP}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_positive_site_is_reduced_to_one_if_the_spike_is_there(family):
    """Laws 1 and 2, and ΔF against the loss, which is the same in every draw."""
    model, guide = exact_guide(family)
    with pytest.warns(UserWarning, match="it is positive, and 0 is not"):
        bmr.reduce(guide)
    result = bmr.reduce(guide, reduced_prior=AT_ONE, select=only_second)
    same = bmr.reduce(guide, sites="g", reduced_prior=bmr.Spike(loc=1.0))
    assert torch.equal(same.masks["g"], KEEP)
    full = Trace_ELBO().loss(model, guide)
    for _ in range(3):
        trace = poutine.trace(result.guide).get_trace()
        assert (trace.nodes["g"]["value"][~KEEP] == 1).all()
        assert (trace.nodes["g"]["value"][KEEP] != 1).all()
        loss = Trace_ELBO().loss(result.model, result.guide)
        assert loss - full == pytest.approx(result.delta_f, abs=1e-9)
    assert (poutine.trace(result.model).get_trace().nodes["g"]["value"][~KEEP] == 1).all()
    elsewhere = poutine.condition(result.model, {"g": torch.full((3,), 7.0).double()})
    used = poutine.trace(elsewhere).get_trace().nodes["y"]["fn"].mean
    mixing = MIXING if model is gains else torch.eye(3).double()
    expected = torch.tensor([0.0, math.log(7.0), 0.0]).double() @ mixing.mT
    torch.testing.assert_close(used, expected)
    assert (result.guide.median()["g"][~KEEP] == 1).all()
    assert (result.guide.quantiles([0.1, 0.9])["g"][:, ~KEEP] == 1).all()
    draws = Predictive(result.model, guide=result.guide, num_samples=5)()
    assert draws["y"].shape[0] == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_laws_hold_for_a_positive_site(family, tmp_path):
    model, guide = exact_guide(family)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    result = bmr.reduce(guide, reduced_prior=AT_ONE, select=only_second)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    check_guide_family(result.guide)

    first = torch.tensor([False, True, True])
    one = bmr.reduce(guide, reduced_prior=AT_ONE, select=lambda s: {"g": first})
    two = bmr.reduce(one.guide, reduced_prior=AT_ONE, select=only_second)
    assert one.delta_f + two.delta_f == pytest.approx(result.delta_f, rel=1e-9)
    torch.testing.assert_close(two.guide.median()["g"], result.guide.median()["g"])

    copied = copy.deepcopy(result)
    torch.save(copied.guide.state_dict(), tmp_path / "guide.pt")
    svi = SVI(result.model, result.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(50):
        svi.step()
    median = result.guide.median()["g"]
    assert (median[~KEEP] == 1).all()
    assert median[KEEP] != copied.guide.median()["g"][KEEP]
    result.guide.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    torch.testing.assert_close(result.guide.median()["g"], copied.guide.median()["g"])
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_a_reduced_positive_site_can_be_fitted():
    model, guide = exact_guide(AutoNormal)
    result = bmr.reduce(guide, reduced_prior=AT_ONE, select=only_second)
    evidence = Trace_ELBO().loss(result.model, result.guide)
    mean, error = bmr.free_energy(result.model, result.guide, num_samples=50)
    assert mean == pytest.approx(evidence, abs=5 * error + 1e-6)
    losses = bmr.fit(result.model, result.guide, num_epochs=30, lr=1e-3, progress=False)
    assert np.mean(losses) == pytest.approx(evidence, abs=0.2)
    assert (result.guide()["g"][~KEEP] == 1).all()


def test_an_element_of_an_interval_is_reduced_to_a_point_inside():
    prior = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2).double(), ONE),
        [dist.transforms.SigmoidTransform()],
    )

    def model():
        pyro.sample("w", prior.to_event(1))

    guide = trained(model, w=([0.0, 2.0], 0.5))
    with pytest.warns(UserWarning, match="constrained to Interval.*, and 0 is not"):
        bmr.reduce(guide)
    result = bmr.reduce(guide, reduced_prior=bmr.Spike(loc=0.5), sites=["w"])
    assert torch.equal(result.masks["w"], torch.tensor([False, True]))
    assert result.guide()["w"][0] == 0.5
    assert result.delta_f == pytest.approx(math.log(0.5))
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=0)
    losses = []
    for program in ((result.model, result.guide), (model, guide)):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(*program))
    # There is no likelihood: what the pruned element added was its divergence from the prior.
    divergence = math.log(2) + 0.25 / 2 - 0.5
    assert losses[0] - losses[1] == pytest.approx(-divergence, abs=0.03)


def test_a_list_of_guides_holds_parents_and_children_apart():
    guide = AutoGuideList(horseshoe)
    guide.append(AutoNormal(poutine.block(horseshoe, expose=["tau"])))
    guide.append(AutoMultivariateNormal(poutine.block(horseshoe, expose=["lam"])))
    guide.append(AutoNormal(poutine.block(horseshoe, expose=["w"])))
    guide()
    loc = read_guide(guide)
    locations = {n: v for factor in loc for n, v in factor.locations().items()}
    prior = priors_of(horseshoe, guide)["w"]
    expected = -0.5 * math.log(2 * math.pi) - locations["tau"] - locations["lam"]
    torch.testing.assert_close(prior.log_density_at_zero, expected, rtol=0, atol=1e-5)


def test_a_learnable_prior_that_the_param_store_has_lost_is_not_read_as_it_began():
    def model():
        scale = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(0.0, scale).expand([3]).to_event(1))

    guide = AutoNormal(model)
    guide()
    pyro.get_param_store()["s"] = torch.tensor(0.1)
    assert bmr.reduce(guide).scores["w"].abs().max() < 0.1
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="depends on the parameter 's', which the param store"):
        assert bmr.reduce(guide).scores == {}


def test_a_gamma_posterior_of_a_log_normal_site_stays_whole():
    def model():
        pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = bmr.mean_field(model, gamma=["tau"])
    guide()
    assert "Gamma" in bmr.reduce(guide).summary().loc["tau", "note"]
    with pytest.raises(ValueError, match="'tau': its posterior is a Gamma distribution"):
        bmr.reduce(guide, sites=["tau"])


def test_missing_observations_are_left_alone_unless_named():
    x = torch.randn(20, 2)
    y, seen = x[:, 0].clone(), torch.arange(20) < 15

    def model(x, y=None, seen=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y, obs_mask=seen)

    guide = AutoNormal(model)
    guide(x, y, seen)
    assert set(bmr.reduce(guide).scores) == {"w"}
    assert "missing" in bmr.reduce(guide).summary().loc["y_unobserved", "note"]

    def other():
        pyro.sample("z_unobserved", dist.Normal(0.0, 1.0))

    guide = AutoNormal(other)
    guide()
    assert set(bmr.reduce(guide).scores) == {"z_unobserved"}


def test_a_prior_that_cannot_be_read_at_some_draws_keeps_its_site_whole():
    def model():
        tau = pyro.sample("tau", dist.Normal(-1 * ONE, ONE))
        pyro.sample("w", dist.Normal(0 * ONE, ONE).mask(tau < 0))

    guide = trained(model, tau=(-1.0, 1.0))
    assert (
        bmr.reduce(guide)
        .summary()
        .loc["w", "note"]
        .startswith("not reduced: at some values of tau it is masked out")
    )


def test_sequential_plates():
    def model():
        for i in pyro.plate("p", 3):
            pyro.sample(f"w{i}", dist.Normal(0.0, 1.0))

    samples = {f"w{i}": torch.randn(1000) for i in range(3)}
    with pytest.warns(UserWarning, match="moment"):
        assert set(bmr.reduce(samples, model=model).scores) == set(samples)
