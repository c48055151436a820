"""`tune_prior` against the marginal likelihood of exact models, computed from scratch."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ExactRegression
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from scipy.optimize import minimize, minimize_scalar
from torch.distributions import MultivariateNormal

import pyro_bmr as bmr
from conftest import make_case
from pyro_bmr.mathematics.scale_search import find_best_variance

N, NOISE = 40, 0.6


class Regression(ExactRegression):
    """Two sites of weights, whose exact posterior is correlated."""

    def __init__(self, weights=(0.9, -0.7, 0.5, 0.02, -0.03, 0.01), loc=0.0, scale=2.0):
        x = torch.randn(N, 6).double() @ (torch.eye(6) + 0.4).double()
        y = x @ torch.tensor(weights).double() + NOISE * torch.randn(N).double()
        loc, scale = (torch.full((6,), value, dtype=torch.float64) for value in (loc, scale))
        super().__init__(x, y, NOISE, loc, scale)

    def model(self):
        a = pyro.sample("net.a", dist.Normal(self.loc[:3], self.scale[:3]).to_event(1))
        b = pyro.sample("net.b", dist.Normal(self.loc[3:], self.scale[3:]).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(self.x @ torch.cat([a, b]), NOISE), obs=self.y)

    def log_evidence(self, scale):
        covariance = NOISE**2 * torch.eye(N).double() + (self.x * scale.square()) @ self.x.mT
        return MultivariateNormal(self.x @ self.loc, covariance).log_prob(self.y)


def assert_exact(problem, result):
    """ΔF is the difference of exact log evidences, and the loss is the new one in every draw."""
    scale = torch.cat([result.scales["net.a"], result.scales["net.b"]])
    before, after = (problem.log_evidence(s).item() for s in (problem.scale, scale))
    assert result.delta_f == pytest.approx(before - after, abs=1e-7)
    for _ in range(2):
        assert Trace_ELBO().loss(result.model, result.guide) == pytest.approx(-after, abs=1e-5)


@pytest.mark.parametrize("family", ["dense", "low_rank"])
@pytest.mark.parametrize(("loc", "scale"), [(0.0, 2.0), (0.1, 0.2)])
def test_by_layer_finds_the_scale_of_the_highest_marginal_likelihood(family, loc, scale):
    problem = Regression(loc=loc, scale=scale)
    result = bmr.tune_prior(getattr(problem, family)(), shared="layer")
    best = minimize_scalar(
        lambda x: -problem.log_evidence(torch.full((6,), math.exp(x)).double()).item(),
        bounds=(-4, 3),
        method="bounded",
        options={"xatol": 1e-10},
    )
    for values in result.scales.values():
        torch.testing.assert_close(
            values, torch.full((3,), math.exp(best.x)).double(), rtol=1e-5, atol=0
        )
    assert_exact(problem, result)
    assert result.delta_f < 0


@pytest.mark.parametrize("family", ["dense", "low_rank"])
def test_by_site_finds_both_scales_of_a_correlated_posterior(family):
    problem = Regression(weights=(0.9, -0.7, 0.5, 0.2, -0.3, 0.1))
    result = bmr.tune_prior(getattr(problem, family)())

    def loss(x):
        scale = torch.tensor(x).exp().repeat_interleave(3)
        return -problem.log_evidence(scale).item()

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    found = [result.scales[name][0].log().item() for name in ("net.a", "net.b")]
    assert found == pytest.approx(best.x.tolist(), abs=1e-4)
    assert_exact(problem, result)
    # Tuning again changes nothing, and so does tuning what is tuned by groups of whole sites.
    again = bmr.tune_prior(result.guide)
    assert again.delta_f == pytest.approx(0, abs=1e-6)
    whole = bmr.tune_prior(
        getattr(problem, family)(),
        shared=lambda name, shape: torch.zeros(shape, dtype=torch.long),
    )
    torch.testing.assert_close(whole.scales["net.a"], result.scales["net.a"])


def test_every_element_for_itself_is_a_stationary_point_of_the_marginal_likelihood():
    problem = Regression()
    result = bmr.tune_prior(problem.dense(), shared=bmr.elements)
    scale = torch.cat([result.scales["net.a"], result.scales["net.b"]])
    assert_exact(problem, result)
    log_scale = scale.log().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.log_evidence(log_scale.exp()), log_scale)
    small = scale < 0.01
    assert 0 < small.sum() < 6
    assert gradient[~small].abs().max() < 1e-4
    # At the lower end the evidence still rises towards the spike.
    assert (gradient[small] < 0).all()
    assert "at the lower end, where the spike wins" in str(result.summary().loc["net.b", "note"])


def make_means(noise=0.5, prior=3.0, loc=0.2):
    """Normal means, of which the mean-field posterior is exact."""
    y = torch.tensor([0.9, -1.2, 0.3, 0.05, 1.4, -0.1], dtype=torch.float64)

    def model():
        with pyro.plate("units", 6):
            w = pyro.sample("w", dist.Normal(torch.full((6,), loc, dtype=torch.float64), prior))
            pyro.sample("y", dist.Normal(w, noise), obs=y)

    guide = AutoNormal(model)
    guide()
    variance = 1 / (1 / noise**2 + 1 / prior**2)
    guide.locs.w = variance * (y / noise**2 + loc / prior**2)
    guide.scales.w = torch.full((6,), math.sqrt(variance), dtype=torch.float64)
    return model, guide, y


def test_independent_elements_that_share_a_scale():
    _, guide, y = make_means()

    def log_evidence(variance):
        scale = torch.tensor(variance + 0.25, dtype=torch.float64).sqrt()
        return dist.Normal(torch.full_like(y, 0.2), scale).log_prob(y).sum().item()

    result = bmr.tune_prior(guide)
    best = ((y - 0.2).square().mean() - 0.25).item()
    torch.testing.assert_close(result.scales["w"], torch.full((6,), best**0.5).double())
    assert result.delta_f == pytest.approx(log_evidence(9.0) - log_evidence(best), abs=1e-8)
    for _ in range(2):
        loss = Trace_ELBO().loss(result.model, result.guide)
        assert loss == pytest.approx(-log_evidence(best), abs=1e-5)
    spread = result.guide.quantiles([0.5])["w"]
    expected = 0.2 + (y - 0.2) * best / (best + 0.25)
    torch.testing.assert_close(spread[0], expected)


def test_every_independent_element_for_itself_has_an_analytic_scale():
    """y ~ N(m, t + noise²) has its maximum at t = (y − m)² − noise², or at the spike."""
    _, guide, y = make_means()
    result = bmr.tune_prior(guide, shared=bmr.elements)
    analytic = (y - 0.2).square() - 0.25
    found = result.scales["w"].square()
    wide = analytic > 0
    torch.testing.assert_close(found[wide], analytic[wide])
    torch.testing.assert_close(found[~wide], torch.full((int((~wide).sum()),), 1e-4 / 4).double())
    note = result.summary().loc["w", "note"]
    assert note == f"{int((~wide).sum())} scales at the lower end, where the spike wins"


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 100_000))
def test_the_search_finds_the_global_maximum(n, seed):
    """Likelihoods of very different widths, whose evidence has several tops."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.rand(n, generator=generator).double() * 16 - 8
    curvature = widths.exp()
    slope = curvature.sqrt() * (2 * torch.randn(n, generator=generator).double())
    highest = torch.tensor([1e6]).double()
    found = find_best_variance(curvature, slope, torch.zeros(n, dtype=torch.long), highest)

    def evidence(t):
        # The mean of each likelihood is N(0, t + its variance) a priori; that of a spike is 0.
        mean, noise = slope / curvature, 1 / curvature
        prior, spike = (dist.Normal(0.0, v.sqrt()) for v in (t[:, None] + noise, noise))
        return (prior.log_prob(mean) - spike.log_prob(mean)).sum(-1)

    low = 1e-4 / curvature.max()
    grid = torch.linspace(low.log().item(), math.log(1e6), 20_001).double().exp()
    best = evidence(grid).max()
    assert evidence(found.variance)[0] >= best - 1e-9
    assert bool(found.spiked) == bool(grid[evidence(grid).argmax()] == grid[0])


def test_groups_are_searched_at_once_as_by_themselves():
    curvature, slope = torch.rand(60).double() + 0.1, 2 * torch.randn(60).double()
    group = torch.arange(60) % 7
    highest = torch.full((8,), 1e4).double()
    together = find_best_variance(curvature, slope, group, highest)
    assert together.variance[7].isnan()
    for g in range(7):
        mine = group == g
        zeros = torch.zeros(int(mine.sum()), dtype=torch.long)
        alone = find_best_variance(curvature[mine], slope[mine], zeros, highest[:1])
        torch.testing.assert_close(together.variance[g], alone.variance[0])


def test_the_ends_of_a_search_are_reported():
    _, guide, _ = make_means(noise=0.5, prior=3.0, loc=900.0)
    capped = bmr.tune_prior(guide)
    assert capped.summary().loc["w", "note"] == "the scale at the upper end of the search"
    assert capped.scales["w"][0].item() == pytest.approx(300.0)
    _, guide, _ = make_means(noise=5.0, loc=0.0)
    spiked = bmr.tune_prior(guide)
    assert spiked.summary().loc["w", "note"] == "the scale at the lower end, where the spike wins"
    assert bmr.reduce(guide).delta_f == pytest.approx(spiked.delta_f, abs=1e-3)


def mixed(n=4):
    pyro.sample("fc.weight", dist.Normal(0.0, 1.0).expand([n]).to_event(1))
    pyro.sample("fc.bias", dist.Normal(0.5, 2.0))
    pyro.sample("out", dist.Normal(0.0, 1.0))
    pyro.sample("v", dist.Laplace(0.0, 1.0))


def make_mixed():
    guide = AutoNormal(mixed, init_scale=0.3)
    guide()
    guide.locs.fc.weight = torch.tensor([0.5, -1.5, 0.8, 0.3])
    return guide


def test_layers_share_a_scale_and_other_sites_keep_their_prior():
    guide = make_mixed()
    result = bmr.tune_prior(guide, shared="layer")
    weight, bias = result.scales["fc.weight"], result.scales["fc.bias"]
    assert weight.shape == (4,)
    assert (weight == bias).all()
    assert not torch.isclose(result.scales["out"], bias)
    table = result.summary()
    assert table.loc["v", "note"].startswith("not tuned: its prior is not Gaussian")
    assert table.loc["fc.weight", "before"] == (1.0, 1.0)
    assert table.loc["fc.weight", "after"] == pytest.approx((bias.item(),) * 2)
    assert "prior tuned per layer" in str(result)
    assert "prior tuned per layer" in result._repr_html_()
    trace = pyro.poutine.trace(result.model).get_trace()
    assert trace.nodes["fc.bias"]["fn"].loc == 0.5
    torch.testing.assert_close(trace.nodes["fc.bias"]["fn"].scale, bias)
    one = bmr.tune_prior(guide, sites=["out"])
    assert set(one.scales) == {"out"}
    assert one.summary().loc["fc.bias", "note"] == "not tuned: it is not among sites="


def test_pruned_elements_and_wide_ones_are_left_out():
    guide, name = make_mixed(), "fc.weight"
    guide.scales.fc.weight = torch.tensor([0.3, 0.3, 1.2, 0.3])
    pruned = bmr.reduce(guide, sites=[name], select=lambda s: {name: s.loc[name] > 0})
    result = bmr.tune_prior(pruned.guide, sites=[name])
    assert result.guide.median()[name][1] == 0
    assert result.scales[name][2] == 1
    assert result.summary().loc[name, "tuned"] == 2
    note = result.summary().loc[name, "note"]
    assert note.endswith("1 without a prior, or wider than it, as they were")
    draw = pyro.poutine.trace(result.model).get_trace().nodes["fc.weight"]["value"]
    assert (draw == 0).tolist() == [False, True, False, False]
    assert math.isfinite(Trace_ELBO().loss(result.model, result.guide))


@pytest.mark.parametrize("names", [("network", "AutoGuideList"), ("network", "AutoDiagonalNormal")])
def test_tuning_trained_guides(names, device):
    case = make_case(*names, device)
    before = {n: v.clone() for n, v in case.guide.state_dict().items()}
    state = torch.get_rng_state()
    result = bmr.tune_prior(case.guide, shared="layer")
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in case.guide.state_dict().items():
        assert torch.equal(value, before[name])
    assert set(result.scales) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert result.scales["fc1.weight"].shape == (5, 4)
    assert result.delta_f < 0
    moved = copy.deepcopy(result).to(device)
    case.train(moved.model, moved.guide, 3)
    assert bmr.reduce(moved.guide).sparsity > 0
    assert math.isfinite(Trace_ELBO().loss(moved.model, moved.guide, *case.args))


def test_groups_of_several_factors_are_tuned_together():
    """A layer that is partly correlated and partly independent: against a grid of exact F."""
    problem = Regression(weights=(0.9, -0.7, 0.5, 0.2, -0.3, 0.1))
    # Orthogonal halves, so that the posterior of one does not depend on the other.
    problem.x[:, 3:] -= problem.x[:, :3] @ torch.linalg.lstsq(problem.x[:, :3], problem.x[:, 3:])[0]
    q, _ = torch.linalg.qr(problem.x[:, 3:])
    problem.x[:, 3:] = 5 * q
    loc, covariance = problem.posterior()
    guide = AutoGuideList(problem.model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(problem.model, expose=["net.a"])))
    guide.append(AutoNormal(pyro.poutine.block(problem.model, expose=["net.b"])))
    guide()
    tril = torch.linalg.cholesky(covariance[:3, :3])
    guide[0].loc.data.copy_(loc[:3])
    guide[0].scale = tril.diagonal()
    guide[0].scale_tril = tril / tril.diagonal()[:, None]
    guide[1].locs.net.b, guide[1].scales.net.b = loc[3:], covariance.diagonal()[3:].sqrt()
    result = bmr.tune_prior(guide, shared="layer")
    best = minimize_scalar(
        lambda x: -problem.log_evidence(torch.full((6,), math.exp(x)).double()).item(),
        bounds=(-4, 3),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert result.scales["net.b"][0].item() == pytest.approx(math.exp(best.x), rel=1e-5)
    assert_exact(problem, result)


@pytest.mark.filterwarnings("ignore:no site")
def test_what_cannot_be_tuned_is_an_error():
    guide = make_mixed()
    with pytest.raises(
        ValueError, match="got shared='ard'. Expected 'site', 'layer', or a function"
    ):
        bmr.tune_prior(guide, shared="ard")
    with pytest.raises(ValueError, match=r"labels of shape \(2,\).*'fc.weight'.*to \(4,\)"):
        bmr.tune_prior(guide, shared=lambda name, shape: torch.arange(2))
    with pytest.raises(ValueError, match="'v': its prior is not Gaussian"):
        bmr.tune_prior(guide, sites=["v"])
    with pytest.warns(UserWarning, match="no site of this guide"):
        guide = AutoNormal(lambda: pyro.sample("u", dist.Laplace(0.0, 1.0)))
        guide()
        assert bmr.tune_prior(guide).delta_f == 0
