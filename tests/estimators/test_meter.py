"""The meter of F, against `free_energy`, against algebra, and over all rows."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

import pyro_bmr as bmr
from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.estimators.parts_of_rows import BLOCK

ROWS = 30


@pytest.fixture
def data():
    x = torch.randn(ROWS, 3)
    return x, x[:, 0] + 0.5 * torch.randn(ROWS)


def linear(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def with_noise(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, precision.rsqrt()), obs=y)


def branching(x, y):
    """As `linear`, but nothing that vmap can follow."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = x @ w if w.sum().item() > 0 else torch.mv(x, w)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def subsampling(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=y[rows])


def subsampling_all(x, y):
    """Of rows whose number does not come from the arguments."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=y[rows])


def autoregressive(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    before = torch.cat([torch.zeros(1), y[:-1]])
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a * before + x[:, 0], 0.5), obs=y)


def latent_rows(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x @ w, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def assemble(model, data, family=AutoNormal, **options):
    guide = family(model, **options)
    guide(*data)
    whole = bmr.reduce(guide, select=bmr.top_k(10**6), model=model)
    return whole.model, whole.guide


def narrow(model, data):
    """A posterior so narrow that F has no noise but that of rows."""
    start = init_to_value(values={"w": torch.tensor([0.5, -0.3, 0.2]), "a": torch.tensor(0.4)})
    return assemble(model, data, init_loc_fn=start, init_scale=1e-4)


def measure(pair, data, count=BLOCK, batch_size=ROWS, seed=0):
    return Meter(pair, data, {}, batch_size, seed).measure(pair, 0, count, {})


def differentiate(pair, data, batch_size):
    """The gradient by the parameters of the one part of a guide."""
    (first,), (second,) = Meter(pair, data, {}, batch_size, 0).differentiate(pair, 400, {})
    return {name: (one + second[name]) / 2 for name, one in first.items()}


@pytest.mark.parametrize("batch_size", [ROWS, 3])
@pytest.mark.parametrize("model", [linear, with_noise, branching, subsampling])
def test_the_same_program_has_the_same_estimates(model, batch_size, data):
    pair = assemble(model, data)
    meter = Meter(pair, data, {}, batch_size, seed=3)
    draws = meter.measure(pair, 0, 12, {})
    assert draws.shape == (12,) and draws.dtype == torch.float64
    assert torch.equal(meter.measure(pair, 0, 12, {}), draws)
    assert torch.equal(meter.measure(pair, 4, 8, {}), draws[4:8]), "in whatever order"
    assert torch.equal(measure(pair, data, 12, batch_size, seed=3), draws), "by another meter"
    assert not torch.equal(measure(pair, data, 12, batch_size, seed=4), draws)


@pytest.mark.parametrize("family", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_correlated_draws_are_the_same_at_once_and_one_by_one(family, data):
    """The second model is the first, in a form that vmap cannot follow."""
    pyro.set_rng_seed(0)
    guide = family(linear, init_scale=0.5)
    guide(*data)
    masks = {"w": torch.tensor([True, False, True])}
    runs, draws = [], []
    for model in (linear, branching):
        calls = []

        def counted(*args, model=model, calls=calls):
            calls.append(args)
            return model(*args)

        decision = bmr.reduce(guide, *data, model=counted, select=lambda _: masks).decision
        pair, couplings = decision.assemble()[:2], decision.couplings()
        meter = Meter(pair, data, {}, ROWS, seed=0)
        calls.clear()
        draws.append(meter.measure(pair, 0, 12, couplings))
        runs.append(len(calls))
    torch.testing.assert_close(*draws, rtol=1e-5, atol=1e-4)
    assert draws[0].std() > 0.1
    assert runs[0] < 12 <= runs[1]


FAMILIES = {
    "independent": (linear, AutoNormal),
    "correlated": (linear, AutoMultivariateNormal),
    "gamma noise": (
        with_noise,
        lambda model, **options: bmr.mean_field(model, gamma=["precision"], **options),
    ),
}


@pytest.mark.parametrize("batch_size", [ROWS, 3])
@pytest.mark.parametrize(("model", "family"), FAMILIES.values(), ids=FAMILIES)
def test_the_mean_is_that_of_free_energy(model, family, batch_size, data):
    pair = assemble(model, data, family, init_scale=0.1)
    mean, error = mean_and_error(measure(pair, data, 100, batch_size))
    expected, its_error = bmr.free_energy(*pair, *data, num_samples=100)
    assert abs(mean - expected) < 4 * (error**2 + its_error**2) ** 0.5


@pytest.mark.parametrize(("rows", "batch_size", "parts"), [(30, 3, 30), (45, 5, 23), (30, 30, 1)])
def test_the_parts_of_a_pass_add_up(rows, batch_size, parts):
    """Each row comes once, whether or not the four estimates of a batch are of equal size."""
    x = torch.randn(rows, 3)
    data = x, x[:, 0] + 0.5 * torch.randn(rows)
    pair = narrow(linear, data)
    (whole,) = measure(pair, data, batch_size=rows)[:1]
    meter = Meter(pair, data, {}, batch_size, seed=0)
    assert meter.parts == parts
    draws = meter.measure(pair, 0, BLOCK * parts, {}).reshape(BLOCK, parts)
    # Estimates differ by at most one row.
    sizes = [len(part) for part in torch.arange(rows).tensor_split(parts)]
    weights = torch.tensor(sizes, dtype=torch.float64) / rows
    for one_pass in draws @ weights:
        assert one_pass.item() == pytest.approx(whole.item(), abs=0.1)
    if parts > 1:
        assert draws.std() > 1, "rows differ, and so do parts"


def test_a_pass_takes_rows_in_an_order_of_its_own(data):
    pair = narrow(linear, data)
    draws = measure(pair, data, 4 * ROWS, batch_size=3).reshape(4, ROWS)
    assert draws[:, 0].std() > 1


def test_a_part_by_itself_has_the_expectation_f(data):
    pair = narrow(linear, data)
    whole = measure(pair, data).mean().item()
    draws = measure(pair, data, 40 * ROWS, batch_size=3).reshape(40, ROWS)
    _, error = mean_and_error(draws[:, 0])
    assert draws[:, 0].mean().item() == pytest.approx(whole, abs=4 * error)


@pytest.mark.parametrize("batch_size", [ROWS, 3])
@pytest.mark.parametrize(
    "family", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
def test_a_batch_is_measured_at_once(family, batch_size, data):
    pair = assemble(linear, data, family, init_scale=0.1)
    meter = Meter(pair, data, {}, batch_size, 0)
    meter.measure(pair, 0, 8, {})
    assert meter._at_once


@pytest.mark.parametrize("model", [autoregressive, latent_rows])
def test_what_is_not_a_sum_over_rows_is_measured_whole(model, data):
    pair = assemble(model, data, init_scale=0.1)
    meter = Meter(pair, data, {}, batch_size=3, seed=0)
    assert meter.parts == 1
    mean, error = mean_and_error(meter.measure(pair, 0, 100, {}))
    expected, its_error = bmr.free_energy(*pair, *data, num_samples=100)
    assert abs(mean - expected) < 4 * (error**2 + its_error**2) ** 0.5


@pytest.mark.parametrize("batch_size", [ROWS, 3])
@pytest.mark.parametrize("model", [subsampling, subsampling_all])
def test_a_sub_sampling_plate_is_measured_over_all_rows(model, batch_size, data):
    pair, whole = narrow(model, data), narrow(linear, data)
    meter = Meter(pair, data, {}, batch_size, seed=0)
    assert meter.parts == 3
    draws = meter.measure(pair, 0, 12, {}).reshape(4, 3)
    expected = measure(whole, data).mean().item()
    for one_pass in draws.mean(1):
        assert one_pass.item() == pytest.approx(expected, abs=0.1)
    assert draws.std() > 1


def test_a_guide_that_was_never_called_learns_its_shapes_from_all_rows(data):
    guide = AutoNormal(latent_rows)
    assert Meter((latent_rows, guide), data, {}, 3, seed=0).parts == 1
    assert guide(*data)["z"].shape == (ROWS,)


def test_keyword_arguments(data):
    x, y = data
    pair = narrow(linear, data)
    for batch_size in (ROWS, 3):
        meter = Meter(pair, (x,), {"y": y}, batch_size, seed=0)
        by_keyword = meter.measure(pair, 0, BLOCK, {})
        torch.testing.assert_close(by_keyword, measure(pair, data, batch_size=batch_size))


def test_a_model_that_observes_nothing():
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        Meter(assemble(model, ()), (), {}, 10, 0)


def conjugate(x, y, loc, scale):
    """A guide of independent normals for `linear`, and F as a function of loc and scale."""
    start = init_to_value(values={"w": loc})
    pair = assemble(linear, (x, y), init_loc_fn=start)
    (part,) = pair[1].parts
    part.scale_unconstrained.data.copy_(scale.expm1().log())

    def free_energy(loc, scale):
        residual = (y - x @ loc).square().sum() + (x.square() @ scale.square()).sum()
        divergence = kl_divergence(Normal(loc, scale), Normal(0.0, 1.0)).sum()
        return 0.5 * residual / 0.5**2 + divergence

    return pair, part, free_energy


@pytest.mark.parametrize("batch_size", [ROWS, 10])
def test_the_gradient_is_that_of_a_conjugate_model(batch_size, data):
    loc, scale = torch.tensor([0.2, 0.5, -0.4]), torch.tensor([0.1, 0.05, 0.02])
    pair, part, free_energy = conjugate(*data, loc, scale)
    found = differentiate(pair, data, batch_size)
    loc = loc.requires_grad_()
    parameter = part.scale_unconstrained.detach().clone().requires_grad_()
    assert torch.allclose(softplus(parameter), scale, rtol=1e-4)
    exact = torch.autograd.grad(free_energy(loc, softplus(parameter)), (loc, parameter))
    for got, expected in zip(
        (found["loc_unconstrained"], found["scale_unconstrained"]), exact, strict=True
    ):
        assert (got - expected).norm() < 0.25 * expected.norm()


def test_the_gradient_is_zero_at_the_exact_posterior(data):
    """Of orthogonal inputs, so that the posterior is independent."""
    x = torch.linalg.qr(data[0])[0] * 6
    y = data[1]
    precision = x.square().sum(0) / 0.5**2 + 1
    loc, scale = x.mT @ y / 0.5**2 / precision, precision.rsqrt()
    pair, _, _ = conjugate(x, y, loc, scale)
    found = differentiate(pair, (x, y), ROWS)
    # In steps of a standard deviation, over which the curvature of F is 1.
    assert (scale * found["loc_unconstrained"]).abs().max() < 4 * 400**-0.5
    assert (scale * found["scale_unconstrained"]).abs().max() < 4 * 400**-0.5


@pytest.mark.parametrize("batch_size", [ROWS, 3])
@pytest.mark.parametrize("model", [linear, branching, subsampling])
def test_nothing_outside_is_changed(model, batch_size, data):
    pair = assemble(model, data)
    pyro.param("other", torch.tensor(1.0))
    before = {name: value.clone() for name, value in pair[1].state_dict().items()}
    stored = set(pyro.get_param_store().keys())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    meter = Meter(pair, data, {}, batch_size, 0)
    meter.measure(pair, 0, 8, {})
    meter.differentiate(pair, 8, {})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert set(pyro.get_param_store().keys()) == stored
    for name, value in pair[1].state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in pair[1].parameters())


@pytest.mark.parametrize("batch_size", [ROWS, 3])
def test_draws_one_by_one_are_distributed_as_those_at_once(batch_size, data):
    draws = []
    for at_once in (True, False):
        pair = assemble(linear, data, init_scale=0.1)
        meter = Meter(pair, data, {}, batch_size, 0)
        meter._at_once = at_once
        draws.append(meter.measure(pair, 0, 600, {}))
        assert meter._at_once == at_once
    (mean, error), (other, its_error) = map(mean_and_error, draws)
    assert abs(mean - other) < 4 * (error**2 + its_error**2) ** 0.5
    assert error == pytest.approx(its_error, rel=0.3)


@pytest.mark.parametrize("batch_size", [ROWS, 3])
def test_a_model_that_vmap_cannot_follow(batch_size, data):
    pair, same = (assemble(model, data, init_scale=0.1) for model in (branching, linear))
    meter = Meter(pair, data, {}, batch_size, 0)
    mean, error = mean_and_error(meter.measure(pair, 0, 200, {}))
    assert not meter._at_once
    other, its_error = mean_and_error(measure(same, data, 200))
    assert abs(mean - other) < 4 * (error**2 + its_error**2) ** 0.5
