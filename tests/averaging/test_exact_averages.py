"""Averages against sums over all models in numpy, which share no code with the package."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.datasets import load_diabetes

import pyro_bmr as bmr
from pyro_bmr import datasets
from pyro_bmr.averaging import contrasts, model_space
from pyro_bmr.averaging.model_space import EnumeratedSpace, open_elements
from pyro_bmr.averaging.subset_mixtures import ListedSubsets, mix_all
from pyro_bmr.factors.factor import Prior
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.programs.sites import Site

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PYRO_BMR_DATA", ROOT.parent / "shared" / "data"))


class Regression:
    """A linear regression with known noise."""

    def __init__(self, x, y, noise, scale):
        self.x, self.y, self.noise = x, y, noise
        self.scale = np.broadcast_to(scale, x.shape[1])

    def fit(self, kept):
        """Log evidence, up to a constant, mean and covariance with some of the columns."""
        x, scale = self.x[:, kept], self.scale[kept]
        precision = x.T @ x / self.noise**2 + np.diag(scale**-2.0)
        covariance = np.linalg.inv(precision)
        loc = covariance @ x.T @ self.y / self.noise**2
        log_determinant = np.linalg.slogdet(precision)[1] + 2 * np.log(scale).sum()
        return 0.5 * (loc @ precision @ loc - log_determinant), loc, (covariance + covariance.T) / 2

    def guide(self, sites=("w",)):
        _, loc, covariance = self.fit(np.ones(len(self.scale), bool))
        return as_guide(loc, covariance, self.scale, sites)


class Oracle(Regression):
    """Every model of a regression: weights, means and covariances.

    Some columns are in all of them: those that ``optional`` is False for.
    """

    def __init__(self, x, y, noise, scale, prior=0.5, optional=None):
        super().__init__(x, y, noise, scale)
        size = x.shape[1]
        self.optional = np.ones(size, bool) if optional is None else optional
        log_odds = np.log(prior) - np.log1p(-np.asarray(prior)) + np.zeros(size)
        index = np.arange(2 ** self.optional.sum())
        kept = np.ones((len(index), size), bool)
        kept[:, self.optional] = index[:, None] >> np.arange(self.optional.sum()) & 1
        fits = [self.fit(k) for k in kept]
        log_weight = (
            np.array([f[0] for f in fits]) + kept[:, self.optional] @ log_odds[self.optional]
        )
        weight = np.exp(log_weight - log_weight.max())
        self.weight = weight / weight.sum()
        self.loc, self.covariances = np.zeros((len(kept), size)), np.zeros((len(kept), size, size))
        for i, (k, (_, loc, covariance)) in enumerate(zip(kept, fits, strict=True)):
            self.loc[i, k] = loc
            self.covariances[i][np.ix_(k, k)] = covariance
        self.presence = self.weight @ kept
        self.mean = self.weight @ self.loc
        square = self.covariances + self.loc[:, :, None] * self.loc[:, None, :]
        self.covariance = np.tensordot(self.weight, square, 1) - np.outer(self.mean, self.mean)

    def cdf(self, direction, value):
        loc = self.loc @ direction
        scale = np.sqrt(np.einsum("i,mij,j->m", direction, self.covariances, direction))
        atom = (value >= loc).astype(float)
        return self.weight @ np.where(
            scale > 0, norm.cdf((value - loc) / np.where(scale > 0, scale, 1)), atom
        )

    def quantile(self, i, level):
        direction = np.eye(len(self.mean))[i]
        below, at = self.cdf(direction, -1e-300), self.cdf(direction, 0.0)
        if below < level <= at:
            return 0.0
        return brentq(lambda value: self.cdf(direction, value) - level, -20, 20, xtol=1e-13)


def as_guide(loc, covariance, scale=1.0, sites=("w",)):
    """A full posterior as a guide; the elements go to these sites, as even as can be."""
    parts = np.array_split(np.broadcast_to(scale, len(loc)), len(sites))

    def model():
        for site, part in zip(sites, parts, strict=True):
            prior = dist.Normal(torch.zeros(len(part)).double(), torch.tensor(part))
            pyro.sample(site, prior.to_event(1))

    guide = AutoMultivariateNormal(model)
    guide()
    tril = torch.linalg.cholesky(torch.tensor(covariance))
    guide.loc.data = torch.tensor(loc)
    guide.scale, guide.scale_tril = tril.diagonal(), tril / tril.diagonal()[:, None]
    return guide


def problem(size=12, seed=0, **options):
    random = np.random.default_rng(seed)
    x = random.normal(size=(40, size)) @ (np.eye(size) + random.normal(size=(size, size)) / 3)
    y = x[:, :4] @ np.array([1.0, -0.5, 0.2, 0.1]) + 2.0 * random.normal(size=40)
    return Oracle(x, y, 2.0, 1.0, **options)


def close(found, expected, error=1e-9):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=error)


def test_an_average_of_twelve_elements_is_the_sum_over_all_4096_models():
    oracle = problem()
    found = bmr.average(oracle.guide())
    close(found.presence["w"], oracle.presence)
    close(found.mean["w"], oracle.mean)
    close(found.variance["w"], oracle.covariance.diagonal())
    close(found.covariance["w"], oracle.covariance)
    assert not found.mean_error and not found.presence_error and not found.variance_error
    assert found.mass < 0.999


def test_sixteen_elements_in_two_blocks_average_as_each_block_does():
    halves = problem(8, seed=1), problem(8, seed=2)
    x = np.zeros((80, 16))
    x[:40, :8], x[40:, 8:] = (half.x for half in halves)
    y = np.concatenate([half.y for half in halves])
    found = bmr.average(Regression(x, y, 2.0, 1.0).guide())
    close(found.mean["w"], np.concatenate([half.mean for half in halves]))
    exact = np.zeros((16, 16))
    exact[:8, :8], exact[8:, 8:] = (half.covariance for half in halves)
    close(found.covariance["w"], exact)
    assert not found.mean_error


def test_intervals_are_quantiles_of_the_mixture():
    oracle = problem(7)
    interval = bmr.average(oracle.guide()).interval(0.8)["w"]
    for i in range(7):
        for row, level in zip(interval, (0.1, 0.9), strict=True):
            assert row[i].item() == pytest.approx(oracle.quantile(i, level), abs=1e-9)
    # Both cases are among them: ends at zero, and ends off it.
    assert 0 < int((interval == 0).sum()) < 14


def test_probabilities_of_contrasts_are_sums_of_normal_tails():
    oracle = problem(7)
    found = bmr.average(oracle.guide(["a", "b"]))
    direction = np.zeros(7)
    direction[[0, 5]] = 1.0, -2.0
    for above in (-0.3, 0.0, 0.7):
        told = found.probability({"a[0]": 1.0, "b[1]": -2.0}, above=above)
        assert told.value == pytest.approx(1 - oracle.cdf(direction, above), abs=1e-9)
        assert told.standard_error == 0.0
    of_all = found.probability({"a": [1.0, 0, 0, 0], "b": torch.tensor([0, -2.0, 0])}, above=0.7)
    assert of_all.value == pytest.approx(told.value, abs=1e-12)


def test_sites_that_stay_are_averaged_with_those_that_can_go():
    """What cannot go is regressed on what can: also in the covariance of the two."""
    optional = np.arange(9) < 5
    oracle = problem(9, optional=optional)
    guide = oracle.guide(["a", "b"])
    found = bmr.average(guide, sites=["a"])
    close(torch.cat([found.mean["a"], found.mean["b"]]), oracle.mean)
    close(found.variance["b"], oracle.covariance.diagonal()[5:])
    close(found.joint_covariance(["a", "b"]), oracle.covariance)
    close(found.joint_covariance(["b", "a"])[:4, 4:], oracle.covariance[5:, :5])
    assert found.interval(0.5)["b"][0][2].item() == pytest.approx(
        oracle.quantile(7, 0.25), abs=1e-9
    )
    direction = np.linspace(-1, 1, 9)
    told = found.probability({"a": direction[:5], "b": direction[5:]}, above=0.2)
    assert told.value == pytest.approx(1 - oracle.cdf(direction, 0.2), abs=1e-9)


def test_draws_have_the_moments_of_the_mixture():
    oracle = problem(8)
    found = bmr.average(oracle.guide())
    draws = found.draw(40_000, seed=3)["w"].numpy()
    error = np.sqrt(oracle.covariance.diagonal() / len(draws))
    assert (np.abs(draws.mean(0) - oracle.mean) < 5 * error).all()
    close(np.cov(draws.T), oracle.covariance, 0.02)
    close((draws != 0).mean(0), oracle.presence, 0.02)
    assert torch.equal(found.draw(5, seed=3)["w"], found.draw(5, seed=3)["w"])
    assert not torch.equal(found.draw(5, seed=3)["w"], found.draw(5, seed=4)["w"])


PRIOR = np.array([0.5, 0.1, 0.9, 0.3, 0.3, 0.7, 0.2, 0.5])


@pytest.mark.parametrize("form", [np.array, torch.tensor, list])
def test_every_element_may_have_a_prior_of_its_own(form):
    oracle = problem(8, prior=PRIOR)
    prior = {"a": form(PRIOR[:4]), "b": form(PRIOR[4:])}
    found = bmr.presence(oracle.guide(["a", "b"]), prior=prior)
    close(torch.cat([found.probability["a"], found.probability["b"]]), oracle.presence)
    average = bmr.average(oracle.guide(["a", "b"]), prior=prior)
    close(torch.cat([average.mean["a"], average.mean["b"]]), oracle.mean)
    assert found.summary().loc["a", "prior"] == pytest.approx(PRIOR[:4].mean())


def test_sites_without_a_prior_have_one_half_and_independent_ones_take_arrays_too():
    guide = AutoNormal(
        lambda: pyro.sample("w", dist.Normal(torch.zeros(2, 3).double(), 1.0).to_event(2))
    )
    guide()
    guide.locs.w, guide.scales.w = torch.randn(2, 3).double(), 0.4 * torch.ones(2, 3).double()
    delta_f = bmr.reduce(guide).scores["w"].numpy()
    columns = np.array([0.2, 0.5, 0.9])
    found = bmr.presence(guide, prior={"w": columns}).probability["w"]
    close(found, 1 / (1 + np.exp(-delta_f) * (1 - columns) / columns))
    close(bmr.presence(guide, prior={}).probability["w"], 1 / (1 + np.exp(-delta_f)))


def test_an_expected_number_is_a_prior_of_so_many_among_all():
    oracle = problem(8, prior=2.5 / 8)
    guide = oracle.guide(["a", "b"])
    found = bmr.presence(guide, expected=2.5)
    close(torch.cat([found.probability["a"], found.probability["b"]]), oracle.presence)
    close(bmr.average(guide, expected=2.5).mean["a"], oracle.mean[:4])


@pytest.mark.parametrize(
    "options",
    [
        {"expected": 0},
        {"expected": 8},
        {"expected": 2, "prior": 0.3},
        {"prior": {"a": 1.0}},
        {"prior": {"a": [0.5, 0.5, 0.5]}},
        {"prior": {"c": 0.5}},
        {"prior": {"a": float("nan")}},
    ],
)
def test_impossible_priors_say_what_to_give(options):
    guide = problem(8).guide(["a", "b"])
    for verb in (bmr.presence, bmr.average):
        with pytest.raises(ValueError, match="Expected"):
            verb(guide, **options)


@pytest.mark.parametrize(
    "contrast",
    [{}, {"c": 1.0}, {"w[9]": 1.0}, {"w[0,1]": 1.0}, {"w": [1.0, 2.0]}, {"w[x]": 1.0}, {1: 1.0}],
)
def test_impossible_contrasts_say_what_to_give(contrast):
    with pytest.raises(ValueError, match="Expected"):
        bmr.average(problem(4).guide()).probability(contrast)


def test_impossible_intervals_and_covariances_are_errors():
    found = bmr.average(problem(4).guide())
    for mass in (0.0, 1.0, 90):
        with pytest.raises(ValueError, match="probability between 0 and 1"):
            found.interval(mass)
    for sites in (["x"], ["w", "w"]):
        with pytest.raises(ValueError, match="different ones of"):
            found.joint_covariance(sites)


@pytest.fixture
def walked(monkeypatch):
    """An average of fourteen elements that had to walk, and the one over all of them."""
    oracle = problem(14, seed=2)
    monkeypatch.setattr(model_space, "MOST_ELEMENTS", 0)
    return bmr.average(oracle.guide(), num_samples=3000), oracle


@pytest.mark.rare
def test_an_average_by_a_walk_agrees_with_all_models_within_its_errors(walked):
    found, oracle = walked
    for mine, error, exact in (
        (found.presence, found.presence_error, oracle.presence),
        (found.mean, found.mean_error, oracle.mean),
        (found.variance, found.variance_error, oracle.covariance.diagonal()),
    ):
        gap = np.abs(mine["w"].numpy() - exact)
        assert (gap < 4 * error["w"].numpy()).all()
        assert (error["w"] < 0.03).all()
    close(found.covariance["w"], oracle.covariance, 0.02)
    direction = np.zeros(14)
    direction[[0, 1]] = 1.0, 1.0
    told = found.probability({"w[0]": 1.0, "w[1]": 1.0}, above=0.3)
    assert 0 < told.standard_error < 0.02
    assert abs(told.value - 1 + oracle.cdf(direction, 0.3)) < 4 * told.standard_error
    interval = found.interval(0.9)["w"]
    direction = np.eye(14)[0]
    assert oracle.cdf(direction, interval[1][0].item()) == pytest.approx(0.95, abs=0.02)
    draws = found.draw(4000)["w"]
    close(draws.mean(0), found.mean["w"], 0.1)


@pytest.mark.parametrize("kind", ["dense", "low rank"])
def test_models_one_by_one_are_models_all_at_once(kind):
    """The way for posteriors of any kind, against that for a few elements of a Gaussian."""
    loc = torch.randn(9).double()
    if kind == "dense":
        posterior = Dense(
            loc, 0.3 * torch.eye(9).double() + 0.2 * torch.randn(9, 9).double().tril()
        )
    else:
        posterior = LowRank(loc, 0.4 * torch.randn(9, 2).double(), 0.1 + torch.rand(9).double())
    sites = (Site("a", torch.Size([5]), 1), Site("b", torch.Size([4]), 1))
    priors = {"a": Prior(torch.tensor(-0.9).double())}
    space = EnumeratedSpace(open_elements(JointFactor(sites, posterior, site_priors=priors)))
    fast = mix_all(space, {"a": 0.3})
    slow = ListedSubsets(fast.elements, fast.posterior, fast.kept, fast.weight)
    close(fast.moments().mean, slow.moments().mean.numpy())
    close(fast.moments().variance, slow.moments().variance.numpy())
    close(fast.covariance(), slow.covariance().numpy())
    directions = torch.randn(9, 2).double()
    for mine, other in zip(fast.project(directions), slow.project(directions), strict=True):
        close(mine, other.numpy())
    close(fast.quantiles((0.1, 0.6)), slow.quantiles((0.1, 0.6)).numpy(), 1e-8)


def two_factors():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["a"])))
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["b"])))
    guide()
    guide[0].locs.a = torch.tensor([0.1, 0.6, -0.4]).double()
    guide[0].scales.a = torch.tensor([0.4, 0.3, 0.2]).double()
    guide[1].loc.data = torch.tensor([0.3, -0.2, 0.8, 0.1]).double()
    guide[1].scale = torch.full((4,), 0.4).double()
    guide[1].scale_tril = torch.eye(4).double() + torch.tensor(0.3).double().expand(4, 4).tril(-1)
    return guide


def test_contrasts_across_factors_are_exact_or_drawn(monkeypatch):
    found = bmr.average(two_factors())
    contrast = {"a": [1.0, -1.0, 0.5], "b[2]": 1.0}
    exact = found.probability(contrast, above=0.1)
    draws = found.draw(100_000)
    value = draws["a"] @ torch.tensor([1.0, -1.0, 0.5]).double() + draws["b"][:, 2]
    assert exact.standard_error == 0.0
    assert exact.value == pytest.approx((value > 0.1).double().mean().item(), abs=0.008)
    monkeypatch.setattr(contrasts, "_MOST", 4)
    drawn = found.probability(contrast, above=0.1)
    assert 0 < drawn.standard_error < 0.01
    assert abs(drawn.value - exact.value) < 4 * drawn.standard_error
    assert found.joint_covariance(["a", "b"])[:3, 3:].abs().max() == 0
    levels = found.interval(0.6)["a"]
    for end, level in zip(levels, (0.2, 0.8), strict=True):
        for i in range(3):
            below = (draws["a"][:, i] < end[i]).double().mean()
            assert below - 0.008 <= level <= (draws["a"][:, i] <= end[i]).double().mean() + 0.008


def test_what_an_average_computes_later_is_not_touched_by_training():
    guide = two_factors()
    first, second = bmr.average(guide), bmr.average(guide)
    told = first.interval(), first.covariance, first.draw(3), first.probability({"b": 1.0})
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 1.0
    again = second.interval(), second.covariance, second.draw(3), second.probability({"b": 1.0})
    for one, two in zip(told[:3], again[:3], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert told[3] == again[3]


def standardised(x, y):
    return ((t - t.mean(0)) / t.std(0) for t in (np.asarray(x), np.asarray(y)))


@pytest.mark.parametrize("name", ["diabetes", "boston"])
def test_inclusion_of_real_inputs_equals_enumeration(name):
    if name == "diabetes":
        x, y = standardised(*load_diabetes(return_X_y=True))
    elif not (DATA / "uci").is_dir():
        pytest.skip("no UCI data; set PYRO_BMR_DATA to their directory")
    else:
        loaded = datasets.load(name, DATA)
        x, y = standardised(loaded.x.double(), loaded.y.double().reshape(len(loaded.x)))
    oracle = Oracle(x, y, 0.7, 0.5)
    guide = oracle.guide()
    close(bmr.presence(guide).probability["w"], oracle.presence, 1e-6)
    found = bmr.average(guide)
    close(found.presence["w"], oracle.presence, 1e-6)
    close(found.mean["w"], oracle.mean, 1e-6)
    close(found.variance["w"], oracle.covariance.diagonal(), 1e-6)


def test_the_window_is_eight_nats_wide():
    found = bmr.average(problem(9).guide(), prior=0.3)
    (window,) = found.windows
    weight = window.weight
    assert math.log(weight[0] / weight[-1]) <= 8.0
    wider = bmr.average(problem(9).guide(), prior=0.3, window=math.exp(9)).windows[0]
    assert len(wider) > len(window)
    assert math.log(wider.weight[0] / wider.weight[len(window)]) > 8.0


def test_the_benchmark_has_500_elements_averaged_within_a_minute():
    table = pd.read_csv(ROOT / "benchmarks" / "averages.csv").set_index("elements")
    assert (
        table.loc[500, [f"{verb} seconds" for verb in ("reduce", "presence", "average")]] < 60
    ).all()
    exact = table.loc[[12, 16], ["presence error", "mean error"]]
    assert (exact == 0).all(axis=None)


def labelled():
    mean = xr.DataArray(
        [[0.0, 1.0], [2.0, 5.0]],
        coords={"to": ["V1", "V2"], "lag": [1, 2]},
        dims=("to", "lag"),
        name="A",
    )
    return bmr.Posterior(mean, scale=0.1, prior_scale=10.0)


@pytest.mark.parametrize("correlated", [False, True])
def test_contrasts_go_by_labels_where_there_are_some(correlated):
    coordinates = {"s": [1, 2, 3]}
    mean = xr.DataArray([0.0, 1.0, 5.0], dims="s", coords=coordinates, name="A")
    spread = {"covariance": 0.01 * (np.eye(3) + 0.1)} if correlated else {"scale": 0.1}
    found = bmr.average(bmr.Posterior(mean, **spread, prior_scale=10.0))
    assert found.probability({"A[1]": 1.0}, above=0.5).value < 1e-4
    assert found.probability({"A[2]": 1.0}, above=0.5).value > 0.99
    assert found.probability({"A[3]": 1.0}, above=4.5).value > 0.99
    for unknown in ("A[0]", "A[-1]", "A[4]"):
        with pytest.raises(ValueError, match=r"Did you mean .*'A\[[123]\]'"):
            found.probability({unknown: 1.0})
    found = bmr.average(labelled())
    assert found.probability({"A[V2,2]": 1.0, "A[V2,1]": -1.0}, above=2.5).value > 0.99
    assert found.probability({"A[V1,*]": 1.0}, above=1.5).value < 1e-4
    with pytest.raises(ValueError, match=r"Did you mean .*'A\[V2,2\]'"):
        found.probability({"A[V2,3]": 1.0})


def test_contrasts_without_labels_go_by_position():
    mean = np.arange(6.0).reshape(2, 3)
    found = bmr.average(bmr.Posterior({"w": mean, "b": 9.0}, scale=0.01, prior_scale=10.0))
    for key, total in {"w[0,2]": 2, "w[1, -1]": 5, "w[1]": 12, "w": 15, "b": 9, "w[*]": 15}.items():
        assert found.probability({key: 1.0}, above=total - 0.2).value > 0.99, key
        assert found.probability({key: 1.0}, above=total + 0.2).value < 0.01, key
    told = found.probability({"w[1]": [0.0, 1.0, 1.0], "b": -1.0}, above=-0.2).value
    assert told > 0.99
    for bad in ({"w[2,0]": 1.0}, {"w[0,0,0]": 1.0}, {"v": 1.0}, {"w[0,0]": [1.0, 2.0]}, {}):
        with pytest.raises(ValueError, match="Expected"):
            found.probability(bad)
