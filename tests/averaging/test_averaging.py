"""Bayesian model averages: against sums over models, against draws, and as a guide."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_bmr as bmr
from conftest import make_case
from pyro_bmr.mathematics.subsets import subset_members

N, NOISE, PRIOR = 30, 0.5, 1.3


class Regression:
    """Known noise, Gaussian prior, correlated columns, and the exact posterior in a guide."""

    def __init__(self, columns):
        self.x = torch.randn(N, columns, dtype=torch.float64)
        self.x[:, 1] = self.x[:, 0] + 0.3 * torch.randn(N, dtype=torch.float64)
        self.y = 0.4 * self.x[:, 0] - 0.4 * self.x[:, 2] + NOISE * torch.randn(N).double()

    def model(self):
        zero = torch.zeros(self.x.shape[1], dtype=torch.float64)
        w = pyro.sample("w", dist.Normal(zero, PRIOR).to_event(1))
        with pyro.plate("data", N):
            return pyro.sample("y", dist.Normal(self.x @ w, NOISE), obs=self.y)

    def fit(self, keep):
        """Log evidence, mean and covariance of the model with these columns."""
        x = self.x[:, keep]
        covariance = (x.mT @ x / NOISE**2 + torch.eye(x.shape[1]) / PRIOR**2).inverse()
        mean = covariance @ x.mT @ self.y / NOISE**2
        of_data = NOISE**2 * torch.eye(N).double() + PRIOR**2 * x @ x.mT
        data = dist.MultivariateNormal(torch.zeros(N).double(), of_data)
        return data.log_prob(self.y), mean, covariance

    def guide(self):
        guide = AutoMultivariateNormal(self.model)
        guide()
        _, mean, covariance = self.fit(torch.ones(self.x.shape[1], dtype=torch.bool))
        tril = torch.linalg.cholesky(covariance)
        guide.loc.data.copy_(mean)
        guide.scale = tril.diagonal()
        guide.scale_tril = tril / tril.diagonal()[:, None]
        return guide

    def average(self, ratio):
        """By fitting every model: weights, what they keep, mean and variance."""
        columns = self.x.shape[1]
        keep = ~subset_members(torch.arange(2**columns), columns)
        fits = [self.fit(k) for k in keep]
        weight = torch.stack([f[0] for f in fits]).softmax(0)
        inside = weight >= weight.max() / ratio
        mass = weight[inside].sum()
        weight = torch.where(inside, weight, 0) / mass
        first, second = torch.zeros(2, columns).double()
        for w, k, (_, mean, covariance) in zip(weight, keep, fits, strict=True):
            first[k] += w * mean
            second[k] += w * (covariance.diagonal() + mean.square())
        return mass, weight @ keep.double(), first, second - first.square(), int(inside.sum())


@pytest.mark.parametrize("window", [20.0, 1e9])
def test_the_average_is_that_of_all_models_fitted_one_by_one(window):
    problem = Regression(7)
    found = bmr.average(problem.guide(), window=window)
    mass, *_, size = problem.average(window)
    assert len(found.windows[0]) == size
    assert found.mass == pytest.approx(mass.item(), abs=1e-9)
    _, presence, mean, variance, _ = problem.average(math.inf)
    torch.testing.assert_close(found.presence["w"], presence, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.mean["w"], mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.variance["w"], variance, rtol=0, atol=1e-8)


def test_the_window_lists_its_models_with_weights_and_masks():
    problem = Regression(6)
    guide = problem.guide()
    (window,) = bmr.average(guide, max_models=5).windows
    assert len(window) == 5
    assert window.weight.sum().item() == pytest.approx(1.0)
    assert (window.weight.diff() <= 0).all()
    for mask, delta_f in zip(window.masks["w"], window.delta_f, strict=True):
        reduced = bmr.reduce(guide, select=lambda scores, mask=mask: {"w": mask})
        assert reduced.delta_f == pytest.approx(delta_f.item(), abs=1e-9)


def test_the_guide_draws_from_the_mixture():
    problem = Regression(6)
    found = bmr.average(problem.guide())
    draws = Predictive(found.guide, num_samples=20_000, parallel=True)()["w"].squeeze()
    error = (found.variance["w"] / len(draws)).sqrt()
    assert ((draws.mean(0) - found.mean["w"]).abs() < 5 * error + 1e-9).all()
    fourth = (draws - draws.mean(0)).pow(4).mean(0)
    error = ((fourth - draws.var(0).square()) / len(draws)).sqrt()
    assert ((draws.var(0) - found.variance["w"]).abs() < 5 * error + 1e-9).all()
    present = (draws != 0).double().mean(0)
    torch.testing.assert_close(present, found.presence["w"], rtol=0, atol=0.02)


def test_draws_of_a_model_have_the_covariance_of_that_model():
    problem = Regression(5)
    found = bmr.average(problem.guide(), window=1e9)
    draws = Predictive(found.guide, num_samples=30_000, parallel=True)()["w"].squeeze()
    keep = found.windows[0].masks["w"][0]
    mine = draws[((draws != 0) == keep).all(-1)][:, keep]
    _, mean, covariance = problem.fit(keep)
    torch.testing.assert_close(mine.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(mine.T.cov(), covariance, rtol=0.2, atol=2e-4)


def test_independent_elements_are_spike_and_slab():
    loc, scale = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.5, 0.4, 0.3])
    guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    guide()
    guide.locs.w, guide.scales.w = loc, scale
    found = bmr.average(guide)
    p = bmr.presence(guide).probability["w"]
    present = torch.bernoulli(p.expand(200_000, 3))
    draws = present * (loc + scale * torch.randn(200_000, 3))
    torch.testing.assert_close(found.presence["w"], p)
    torch.testing.assert_close(found.mean["w"], draws.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(found.variance["w"], draws.var(0), rtol=0, atol=0.01)
    assert found.mass == 1.0
    sampled = Predictive(found.guide, num_samples=20_000, parallel=True)()["w"].squeeze()
    torch.testing.assert_close(sampled.mean(0), found.mean["w"], rtol=0, atol=0.02)
    torch.testing.assert_close(sampled.var(0), found.variance["w"], rtol=0, atol=0.02)


def test_a_window_among_sampled_models_holds_the_best_of_them():
    """18 elements, all but four of them without doubt: few models hold all the probability."""
    loc = torch.full((18,), 4.0).double()
    loc[:4] = torch.tensor([0.5, 0.4, 0.0, 0.6])
    tril = 0.3 * torch.eye(18).double() + 0.05 * torch.randn(18, 18).double().tril(-1)
    guide = AutoMultivariateNormal(
        lambda: pyro.sample("w", dist.Normal(torch.zeros(18).double(), 1.0).to_event(1))
    )
    guide()
    guide.loc.data.copy_(loc)
    guide.scale, guide.scale_tril = tril.diagonal(), tril / tril.diagonal()[:, None]
    found = bmr.average(guide, window=1e6)
    (window,) = found.windows
    masks = window.masks["w"]
    assert len(window) >= 16
    assert masks[:, 4:].all()
    assert found.mass > 0.999
    assert len({tuple(m.tolist()) for m in masks}) == len(window)
    for mask, delta_f in zip(masks[:4], window.delta_f[:4], strict=True):
        reduced = bmr.reduce(guide, select=lambda scores, mask=mask: {"w": mask})
        assert reduced.delta_f == pytest.approx(delta_f.item(), abs=1e-8)
    presence = bmr.presence(guide)
    error = 5 * presence.standard_error["w"] + 1e-3
    assert ((found.presence["w"] - presence.probability["w"]).abs() < error).all()


def low_rank_model():
    pyro.sample("w", dist.Normal(torch.zeros(6), 1.0).to_event(1))


def test_low_rank_posteriors_average_as_their_dense_twins():
    guide = AutoLowRankMultivariateNormal(low_rank_model, rank=2, init_scale=0.4)
    guide()
    guide.loc.data.copy_(torch.tensor([0.1, 0.5, 0.6, -0.4, 0.0, 1.0]))
    dense = AutoMultivariateNormal(low_rank_model)
    dense()
    distribution = guide.get_posterior()
    tril = distribution.scale_tril
    dense.loc.data.copy_(guide.loc.data)
    dense.scale, dense.scale_tril = tril.diagonal(), tril / tril.diagonal()[:, None]
    first, second = bmr.average(guide), bmr.average(dense)
    for one, two in ((first.mean, second.mean), (first.variance, second.variance)):
        torch.testing.assert_close(one["w"], two["w"], rtol=1e-4, atol=1e-5)
    draws = Predictive(first.guide, num_samples=10_000, parallel=True)()["w"].squeeze()
    torch.testing.assert_close(draws.var(0), first.variance["w"], rtol=0.1, atol=1e-3)


CASES = [
    ("network", "AutoNormal"),
    ("network", "AutoMultivariateNormal"),
    ("network", "mean_field"),
    ("functional", "AutoLowRankMultivariateNormal"),
    ("functional", "AutoStructured"),
    ("functional", "nested AutoGuideList"),
]


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_every_kind_of_factor_averages(names, device):
    """Names, shapes and prediction; what was pruned before stays absent."""
    case = make_case(*names, device)
    first = case.reduce(select=bmr.baselines.random(0.3))
    store = pyro.get_param_store().keys()
    before = torch.get_rng_state()
    found = bmr.average(first.guide, num_samples=60, max_models=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert pyro.get_param_store().keys() == store
    x, _ = case.args
    full = case.trace()
    for program in (found.guide, copy.deepcopy(found.guide)):
        draw = poutine.trace(program).get_trace(*case.args)
        for name, mask in first.masks.items():
            assert draw.nodes[name]["value"].shape == full.nodes[name]["value"].shape
            assert (draw.nodes[name]["value"][~mask] == 0).all()
            assert (found.presence[name][~mask] == 0).all()
            assert (found.mean[name][~mask] == 0).all()
            assert (found.variance[name][~mask] == 0).all()
    for site in first.sites:
        assert found.mean[site.name].isfinite().all()
        assert (found.variance[site.name] >= 0).all()
    for name, p in found.presence.items():
        assert ((p >= 0) & (p <= 1)).all(), name
    predicted = Predictive(found.model, guide=found.guide, num_samples=5)(x)
    assert predicted["y"].shape == (5, len(x))
    assert "average over all reduced models" in str(found)
    drawn, interval = found.draw(3), found.interval(0.8)
    for name in found.presence:
        assert (interval[name][0] <= interval[name][1]).all()
    for site in first.sites:
        assert drawn[site.name].shape == (3, *found.mean[site.name].shape)
        if site.name in first.masks:
            assert (drawn[site.name][:, ~first.masks[site.name]] == 0).all()
        of_all = found.covariance[site.name].diagonal().reshape(found.mean[site.name].shape)
        variance = found.variance[site.name].double()
        torch.testing.assert_close(of_all, variance, rtol=1e-4, atol=1e-9)


def test_sites_of_a_list_average_by_factor():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["a"]), init_scale=0.3))
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["b"]), init_scale=0.3))
    guide()
    found = bmr.average(guide)
    assert len(found.windows) == 1
    assert found.windows[0].masks.keys() == {"b"}
    assert found.presence.keys() == {"a", "b"}
    only = bmr.average(guide, sites=["a"])
    assert only.presence.keys() == {"a"}
    torch.testing.assert_close(only.mean["b"], guide[1].loc)
    assert not only.windows


@pytest.mark.parametrize("options", [{"window": 0.5}, {"window": math.nan}, {"max_models": 0}])
def test_impossible_options_are_errors(options):
    with pytest.raises(ValueError, match="Expected"):
        bmr.average(Regression(4).guide(), **options)


def test_an_average_stays_as_it_is_when_the_guide_is_trained_on():
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("noise", dist.LogNormal(0.0, 1.0))

    guide = AutoNormal(model)
    guide()
    found = bmr.average(guide)
    means = {name: mean.clone() for name, mean in found.mean.items()}
    state = {name: value.clone() for name, value in found.guide.state_dict().items()}
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 1.0
    assert all(torch.equal(found.mean[name], mean) for name, mean in means.items())
    assert all(torch.equal(found.guide.state_dict()[name], value) for name, value in state.items())


def test_tables_say_what_is_there():
    problem = Regression(3)
    found = bmr.average(problem.guide(), window=1e9)
    row = found.summary().loc["w"]
    assert row["total"] == 3
    assert row["expected"] == pytest.approx(found.presence["w"].sum().item())
    presence = bmr.presence(problem.guide()).summary().loc["w"]
    assert presence["expected"] == pytest.approx(row["expected"])
    assert presence["prior"] == pytest.approx(0.5)
    html = found._repr_html_()
    assert "% of the probability" in html and html.count("<table") == 2
