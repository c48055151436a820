"""Positive elements that are set to zero: loadings of regressions, rates, whole factors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from often import often
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch.distributions import kl_divergence

import pyro_bmr as bmr
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.programs.positive_divergences import divergence

QUIET = bmr.by_free_energy(progress=False)
POSTERIORS = {
    "LogNormal": dist.LogNormal(*torch.tensor([[-0.3, 1.0], [0.2, 0.9]]).double()),
    "Gamma": dist.Gamma(*torch.tensor([[0.8, 12.0], [1.5, 3.0]]).double()),
}
PRIORS = {
    "Gamma": dist.Gamma(0.6, 1.3),
    "Exponential": dist.Exponential(0.7),
    "HalfNormal": dist.HalfNormal(1.4),
    "LogNormal": dist.LogNormal(0.3, 1.2),
    "HalfCauchy": dist.HalfCauchy(1.0),
    "Weibull": dist.Weibull(1.2, 0.8),
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", POSTERIORS)
def test_divergences_against_quadrature(family, prior):
    q, p = POSTERIORS[family], PRIORS[prior]
    if family == "Gamma" and prior in {"HalfCauchy", "Weibull"}:
        with pytest.raises(NotImplementedError, match="Gamma posterior from a"):
            divergence(q, p)
        return

    t = torch.linspace(-30, 20, 200_001).double()[:, None]
    log_q = q.log_prob(t.exp())
    weight = (log_q + t).exp()
    expected = torch.trapezoid(
        weight * (log_q - p.log_prob(t.exp())).where(weight > 0, 0), t, dim=0
    )
    torch.testing.assert_close(divergence(q, p), expected, rtol=1e-4, atol=1e-4)


def counts_model(counts, background=0.0):
    """Poisson counts, a column each of which has its own rate above the background."""
    rate = pyro.sample("rate", dist.Exponential(0.5).expand(counts.shape[1:]).to_event(1))
    pyro.sample("y", dist.Poisson((rate + background).expand(counts.shape)).to_event(2), obs=counts)


def test_a_gamma_posterior_that_is_exact():
    """Without a count the evidence is ln λ / (λ + n) with the rate, and 0 without it."""
    counts = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 1.0]])
    guide = bmr.AutoGamma(counts_model, init_loc_fn=init_to_value(values={"rate": torch.ones(2)}))
    guide(counts)
    alpha = 1 + counts.sum(0)
    guide.concentrations.rate = alpha
    guide.means.rate = alpha / (0.5 + 3)
    result = bmr.reduce(guide, counts, sites="rate", select=QUIET)
    assert torch.equal(result.masks["rate"], torch.tensor([False, True]))
    expected = math.log(0.5 / 3.5)
    assert result.scores["rate"][0].item() == pytest.approx(expected, rel=1e-5)
    assert result.delta_f == pytest.approx(expected, rel=1e-5)
    assert abs(result.realised - expected) < 3 * result.realised_error + 1e-4
    evidence = log_evidence(counts[:, 1], 0.0)
    free_energy, error = bmr.free_energy(result.model, result.guide, counts, num_samples=400)
    assert free_energy == pytest.approx(-evidence, abs=4 * error + 1e-3)


def log_evidence(counts, background):
    rate = torch.linspace(0, 30, 30_001).double()
    log_joint = dist.Exponential(0.5).log_prob(rate)
    log_joint = log_joint + dist.Poisson(rate + background).log_prob(counts[:, None].double()).sum(
        0
    )
    return math.log(torch.trapezoid(log_joint.exp(), rate))


@pytest.mark.rare
@pytest.mark.parametrize("family", ["gamma", "normal"])
def test_rates_above_a_background(family):
    """Against the evidence of either model, by quadrature; q is close to the posterior."""
    pyro.set_rng_seed(0)
    background = 2.0
    counts = dist.Poisson(background + torch.tensor([0.0, 0.0, 4.0])).sample((20,))
    guide = (bmr.AutoGamma if family == "gamma" else AutoNormal)(counts_model)
    kwargs = {"background": background}
    options = {"lr": 0.03, "progress": False, "compile": False}
    bmr.fit(counts_model, guide, counts, kwargs=kwargs, num_epochs=800, **options)
    result = bmr.reduce(guide, counts, kwargs=kwargs, sites="rate", select=QUIET)
    assert torch.equal(result.masks["rate"], torch.tensor([False, False, True]))
    without = dist.Poisson(background).log_prob(counts).sum(0)
    exact = [log_evidence(counts[:, i], background) - float(without[i]) for i in range(3)]
    pairs = [(counts_model, guide), (result.model, result.guide)]
    (full, error), (reduced, its_error) = (
        bmr.free_energy(*pair, counts, kwargs=kwargs, num_samples=1500, estimator=Trace_ELBO())
        for pair in pairs
    )
    realised, error = reduced - full, math.hypot(error, its_error)
    # What F of q is above that of the exact posterior goes with it.
    slack = 0.05 if family == "gamma" else 0.4
    assert -slack - 4 * error < realised - (exact[0] + exact[1]) < 4 * error
    assert result.delta_f == pytest.approx(realised, abs=4 * error + 0.05)
    # Few draws of a skewed posterior.
    assert result.realised == pytest.approx(realised, abs=1.0)
    assert result.scores["rate"][2] > 10
    assert exact[2] > 10


def loadings_model(x, y=None):
    w = pyro.sample("w", dist.HalfNormal(1.0).expand([8]).to_event(1))
    v = pyro.sample("v", dist.LogNormal(0.0, 1.0).expand([8]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x[:, :8] * w + x[:, 8:] * v).sum(-1), 0.5), obs=y)


@pytest.fixture(scope="module")
def loadings():
    pyro.set_rng_seed(2)
    x = torch.randn(150, 16)
    true = torch.zeros(16)
    true[torch.tensor([0, 3, 9, 12])] = torch.tensor([1.0, 0.6, 1.5, 0.8])
    y = x @ true + 0.5 * torch.randn(150)
    guide = AutoNormal(loadings_model, init_scale=0.1)
    bmr.fit(loadings_model, guide, x, y, num_epochs=800, lr=0.05, progress=False, compile=False)
    return guide, x, y, true


def test_loadings_that_are_zero_go_and_others_stay(loadings):
    guide, x, y, true = loadings
    result = bmr.reduce(guide, x, y, sites=["w", "v"], select=QUIET)
    kept = torch.cat([result.masks["w"], result.masks["v"]])
    assert torch.equal(kept, true > 0)
    pairs = [(loadings_model, guide), (result.model, result.guide)]
    elbo = Trace_ELBO(400, vectorize_particles=True, max_plate_nesting=1)
    (full, error), (reduced, its_error) = (
        bmr.free_energy(*pair, x, y, num_samples=25, estimator=elbo) for pair in pairs
    )
    assert reduced - full == pytest.approx(
        result.realised, abs=4 * math.hypot(error, its_error, result.realised_error)
    )
    assert result.realised < -10
    assert result.delta_f == pytest.approx(result.realised, rel=0.3)
    by_evidence = bmr.reduce(guide, x, y, sites=["w", "v"], select=bmr.by_evidence())
    assert torch.equal(torch.cat([by_evidence.masks["w"], by_evidence.masks["v"]]), true > 0)
    assert "second order" in result.summary().loc["w", "note"]


def test_without_data_a_positive_site_is_left_whole(loadings):
    guide, x, y, _ = loadings
    with pytest.raises(ValueError, match=r"'w': it is positive, and 0 is not.*with the data"):
        bmr.reduce(guide, sites=["w"])
    with pytest.raises(ValueError, match="'w': it is positive, and 0 is not"):
        bmr.presence(guide, x, y, sites=["w"])
    with pytest.warns(UserWarning, match="no site of this guide can be reduced"):
        left = bmr.reduce(guide)
    assert left.masks == {}
    with pytest.warns(UserWarning, match="it is positive"):
        assert bmr.reduce(guide, x, y).masks == {}


def test_without_observations_a_positive_site_is_left_whole():
    def model(x):  # noqa: ARG001
        pyro.sample("w", dist.HalfNormal(1.0).expand([8]).to_event(1))

    guide = AutoNormal(model)
    guide(torch.ones(1))
    with pytest.raises(ValueError, match="'w': the model observes nothing"):
        bmr.reduce(guide, torch.ones(1), sites=["w"])


def test_correlated_positive_elements_are_left_whole(loadings):
    _, x, y, _ = loadings
    guide = AutoMultivariateNormal(loadings_model)
    guide(x, y)
    message = "'w': it is positive.*; this guide has it correlated with others.* as in AutoNormal"
    with pytest.raises(ValueError, match=message):
        bmr.reduce(guide, x, y, sites=["w"])
    with pytest.raises(ValueError, match=message):
        bmr.reduce(guide, sites=["w"])
    with pytest.warns(UserWarning, match="no site of this guide can be reduced"):
        assert "correlated" not in str(bmr.reduce(guide, x, y))


def test_a_prior_that_depends_on_another_site():
    """The divergence is expected: KL(q ‖ p) is linear in E[1 / s²] and E[ln s]."""

    def model(y=None):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.HalfNormal(s * torch.ones(2)).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.1).to_event(1), obs=y)

    y = torch.tensor([0.0, 1.0])
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"s": torch.tensor(2.0)}))
    guide(y)
    guide.scales.s = torch.tensor(0.2)
    guide.locs.w, guide.scales.w = torch.tensor([-3.0, 0.0]), torch.tensor([0.5, 0.1])
    seen = []

    def select(scores):
        (factor,) = (f for f in scores.factors if f.sites[0].name == "w")
        seen.append(factor.prior.divergence.value)
        return scores.kept

    bmr.reduce(guide, y, sites="w", select=select)
    s = math.log(2.0)
    log_s, precision = s, math.exp(-2 * s + 2 * 0.2**2)
    q = dist.LogNormal(guide.locs.w, guide.scales.w)
    unit = kl_divergence(q, dist.HalfNormal(1.0))
    square = (q.variance + q.mean**2).detach()
    expected = unit + log_s + 0.5 * square * (precision - 1)
    torch.testing.assert_close(seen[0], expected.detach().double(), rtol=1e-3, atol=1e-3)


K = 10


def factorisation(y):
    w = pyro.sample("W", dist.Gamma(1.0, 0.5).expand([len(y), K]).to_event(2))
    h = pyro.sample("H", dist.Exponential(0.5).expand([K, y.shape[1]]).to_event(2))
    pyro.sample("y", dist.Poisson(w @ h + 1e-6).to_event(2), obs=y)


def factors(name, shape):  # noqa: ARG001
    return torch.arange(K)[:, None] if name == "H" else torch.arange(K)


def ascend(y, seed):
    """The optimum of a Gamma posterior near a random start: Cemgil (2009), eq. 24 to 27."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W": (len(y), K), "H": (K, y.shape[1])}
    alpha = {n: 1 + 2 * torch.rand(shape, generator=generator) for n, shape in shapes.items()}
    rate = {name: torch.ones(shape) for name, shape in shapes.items()}
    for _ in range(1500):
        for name, other in (("W", "H"), ("H", "W")):
            w, h = ((alpha[n].digamma() - rate[n].log()).exp() for n in shapes)
            ratio = y / (w @ h + 1e-6)
            alpha[name] = 1 + (w * (ratio @ h.T) if name == "W" else h * (w.T @ ratio))
            total = (alpha[other] / rate[other]).sum(1 if name == "W" else 0)
            rate[name] = 0.5 + (total if name == "W" else total[:, None]).expand(shapes[name])
    return alpha, rate


def gamma_guide(y, seed):
    alpha, rate = ascend(y, seed)
    guide = bmr.AutoGamma(factorisation)
    guide(y)
    for name in alpha:
        setattr(guide.concentrations, name, alpha[name])
        setattr(guide.means, name, alpha[name] / rate[name])
    return guide


@pytest.fixture(scope="module", params=often([0, 1, 2], 0))
def counts_and_guide(request):
    """Counts of three factors, and a guide at an optimum."""
    pyro.set_rng_seed(request.param)
    true = dist.Gamma(0.5, 0.25).sample((60, 3)), dist.Gamma(0.5, 0.25).sample((3, 20))
    y = dist.Poisson(true[0] @ true[1]).sample()
    return y, gamma_guide(y, request.param)


@pytest.mark.parametrize("family", ["gamma", "normal"])
def test_the_factors_of_a_factorisation(family, counts_and_guide):
    y, guide = counts_and_guide
    if family == "normal":
        posterior = guide
        guide = AutoNormal(factorisation)
        guide(y)
        for factor in read_guide(posterior):
            for name, marginal in factor.marginals().items():
                setattr(guide.locs, name, marginal.loc.detach())
                setattr(guide.scales, name, marginal.scale.detach())
        options = {"progress": False, "compile": False}
        bmr.fit(factorisation, guide, y, num_epochs=400, lr=lambda x: 0.05 * (1 - x), **options)
    result = bmr.reduce(guide, y, groups=factors, select=QUIET)
    assert int(result.masks["W"].any(0).sum()) == 3
    assert torch.equal(result.masks["W"].any(0), result.masks["H"].any(1))
    assert torch.equal(result.masks["W"].all(0), result.masks["H"].all(1))
    (layer,) = result.layers
    assert (layer.groups, layer.kept) == (K, 3)
    assert result.realised < -5 * result.realised_error
    full, error = bmr.free_energy(factorisation, guide, y, num_samples=100)
    reduced, its_error = bmr.free_energy(result.model, result.guide, y, num_samples=100)
    assert reduced < full
    assert reduced - full == pytest.approx(
        result.realised, abs=4 * math.hypot(error, its_error, result.realised_error)
    )
    if family == "gamma":  # which is at its optimum
        assert result.delta_f == pytest.approx(result.realised, rel=0.1)
