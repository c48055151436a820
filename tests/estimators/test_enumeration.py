"""Discrete sites are summed out: F is that of the same model with the sum written out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from mixtures import PAIRS, ROWS_APART, X, Y
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr
from pyro_bmr.estimators.measurement import common_draws
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.programs.batches import Batches, BatchModel


@pytest.mark.parametrize("name", PAIRS)
def test_one_draw_gives_the_terms_of_the_sum_written_out(name):
    pair = PAIRS[name]
    guide = pair.guide(X, Y)
    terms = []
    for model in (pair.summed, pair.written_out):
        elbo = bmr.GlobalELBO()
        elbo.learn(model, guide, X, Y)
        pyro.set_rng_seed(0)
        terms.append(elbo.split_loss(model, guide, X, Y))
    assert terms[0] == pytest.approx(terms[1], rel=1e-5)
    assert terms[0][1] < -1


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_the_sum_written_out(name):
    pair = PAIRS[name]
    guide = pair.guide(X, Y)
    gradients = []
    for model in (pair.summed, pair.written_out):
        elbo = bmr.GlobalELBO()
        elbo.learn(model, guide, X, Y)
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(model, guide, X, Y)
        gradients.append(torch.cat([g.reshape(-1) for g in _gradients(loss, guide)]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().max() > 0.1


def _gradients(loss, guide):
    return torch.autograd.grad(loss, list(guide.parameters()))


@pytest.mark.parametrize("name", ROWS_APART)
def test_rows_that_are_independent_are_drawn_by_themselves_as_in_the_sum_written_out(name):
    pair = ROWS_APART[name]
    guide = pair.guide(X, Y)
    summed, written_out = (
        common_draws(model, guide, (X, Y), {}, 4) for model in (pair.summed, pair.written_out)
    )
    torch.testing.assert_close(summed, written_out, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["shared", "nested", "chains"])
def test_weights_of_rows_that_share_a_sum_are_drawn_once(name):
    pair = PAIRS[name]
    guide = pair.guide(X, Y)
    _, whole = common_draws(pair.summed, guide, (X, Y), {}, 3)
    _, expected = common_draws(pair.written_out, guide, (X, Y), {}, 3)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_the_meter_takes_all_draws_at_once(name):
    pair = PAIRS[name]
    guide = pair.guide(X, Y)
    meter = Meter((pair.summed, guide), (X, Y), {}, 2_000, 0)
    draws = meter.measure((pair.summed, guide), 0, 4, {})
    other = Meter((pair.written_out, guide), (X, Y), {}, 2_000, 0)
    expected = other.measure((pair.written_out, guide), 0, 4, {})
    assert meter._at_once
    assert other._at_once
    torch.testing.assert_close(draws, expected, rtol=1e-5, atol=1e-4)


def test_pyro_agrees():
    pair = PAIRS["nested"]
    guide = pair.guide(X, Y)
    pyro.set_rng_seed(0)
    mean, error = bmr.free_energy(pair.summed, guide, X, Y)
    options = {"estimator": TraceEnum_ELBO(max_plate_nesting=2), "num_samples": 300}
    expected, its_error = bmr.free_energy(pair.summed, guide, X, Y, **options)
    assert abs(mean - expected) < 4 * (error**2 + its_error**2) ** 0.5


@pytest.mark.parametrize(("name", "parts"), [("clusters", 48), ("shared", 1)])
def test_rows_are_measured_in_parts_where_the_sum_leaves_them_apart(name, parts):
    x, y = X.repeat(20, 1), Y.repeat(20)
    pair = PAIRS[name]
    guide = pair.guide(x, y)
    meter = Meter((pair.summed, guide), (x, y), {}, 20, 0)
    draws = meter.measure((pair.summed, guide), 0, 96, {})
    mean, error = bmr.free_energy(pair.written_out, guide, x, y)
    assert meter.parts == parts
    assert abs(draws.mean() - mean) < 4 * (error + draws.std() / len(draws) ** 0.5)


@pytest.mark.parametrize("estimator", ["global", "local", TraceEnum_ELBO(max_plate_nesting=1)])
def test_batches_are_trained_on_with_the_site_of_each_row_scaled(estimator):
    pair = PAIRS["outliers"]
    model = BatchModel(pair.summed, Batches((X, Y), {}, 4))
    assert model.scaled == {"k", "y"}
    guide = pair.guide(X, Y)
    options = {"num_epochs": 60, "lr": 0.05, "seed": 0, "progress": False, "estimator": estimator}
    losses = bmr.fit(pair.summed, guide, X, Y, batch_size=4, **options)
    assert losses[-1] < losses[0]


def test_batches_cannot_share_a_site():
    pair = PAIRS["shared"]
    with pytest.raises(ValueError, match=r"scales \{'k': 1.0, 'y': 3.0\}.*batch_size"):
        bmr.fit(pair.summed, pair.guide(X, Y), X, Y, num_epochs=1, batch_size=4, progress=False)


def without_plate(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(x @ w + k, 1.0), obs=y)


def outside(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(x @ w + k.expand(*k.shape[:-1], 12), 1.0).to_event(1), obs=y)


def branching(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    k = pyro.sample("k", dist.Bernoulli(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w if k else -x @ w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config_enumerate(without_plate), "'y' has the shape .*no plate, where .'k'. are summed"),
        (config_enumerate(outside), "'y' has the shape .*no plate, where .'k'. are summed"),
        (config_enumerate(branching), r"\['k'\] cannot be summed out \(RuntimeError: Bool"),
        (config_enumerate(branching, default="sequential"), r"sample \['k'\].*\"parallel\""),
        (branching, r"does not sample \['k'\].*config_enumerate"),
    ],
)
def test_what_cannot_be_summed_out_is_named(model, message):
    guide = AutoNormal(poutine.block(model, hide=["k"]))
    guide(X, Y)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        bmr.free_energy(model, guide, X, Y)


def test_moments_do_not_go_through_a_sum():
    pair = PAIRS["outliers"]
    with pytest.raises(ValueError, match=r"\['k'\] are summed out.*'global'"):
        bmr.MomentsELBO().loss(pair.summed, pair.guide(X, Y), X, Y)
