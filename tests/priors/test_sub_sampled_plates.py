"""Priors that differ between the rows of plates of which a run of the model sees a part."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_bmr as bmr

SCALES = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0])
TABLE = 1 + torch.arange(15.0).reshape(5, 3)


def drop_all(scores):
    return {name: torch.zeros_like(kept) for name, kept in scores.kept.items()}


def one_plate():
    with pyro.plate("rows", 5, subsample_size=2) as index:
        pyro.sample("w", dist.Normal(0.0, SCALES[index]))


def one_row_at_a_time():
    with pyro.plate("rows", 5, subsample_size=1) as index:
        pyro.sample("w", dist.Normal(0.0, SCALES[index]))


def rows_taken_by_pyro():
    with pyro.plate("rows", 5, subsample_size=3):
        pyro.sample("w", dist.Laplace(0.0, pyro.subsample(SCALES, event_dim=0)))


def vectors():
    with pyro.plate("rows", 5, subsample_size=2) as index:
        pyro.sample("w", dist.Normal(0.0, TABLE[index]).to_event(1))


def by_a_function_of_the_index():
    with pyro.plate("rows", 5, subsample_size=2) as index:
        pyro.sample("w", dist.StudentT(3.0, 0.0, 1.0 + index))


def nested():
    rows = pyro.plate("rows", 5, subsample_size=2, dim=-2)
    columns = pyro.plate("columns", 3, subsample_size=2, dim=-1)
    with rows as i, columns as j:
        pyro.sample("w", dist.Normal(0.0, TABLE[i][:, j]))


def nested_along_one():
    rows = pyro.plate("rows", 5, subsample_size=2, dim=-2)
    with rows as i, pyro.plate("columns", 3, subsample_size=2, dim=-1):
        pyro.sample("w", dist.Normal(0.0, SCALES[i, None]))


ZERO = torch.zeros(())
CASES = {
    "one": (one_plate, dist.Normal(0.0, SCALES).log_prob(ZERO)),
    "one row at a time": (one_row_at_a_time, dist.Normal(0.0, SCALES).log_prob(ZERO)),
    "pyro.subsample": (rows_taken_by_pyro, dist.Laplace(0.0, SCALES).log_prob(ZERO)),
    "vectors": (vectors, dist.Normal(0.0, TABLE).log_prob(ZERO)),
    "function of the index": (
        by_a_function_of_the_index,
        dist.StudentT(3.0, 0.0, 1.0 + torch.arange(5.0)).log_prob(ZERO),
    ),
    "nested": (nested, dist.Normal(0.0, TABLE).log_prob(ZERO)),
    "nested along one": (
        nested_along_one,
        dist.Normal(0.0, SCALES[:, None]).log_prob(ZERO).expand(5, 3),
    ),
}


@pytest.mark.parametrize(("model", "log_prior"), CASES.values(), ids=CASES)
def test_all_rows_are_seen(model, log_prior):
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    guide()
    posterior = dist.Normal(guide.locs.w.detach(), guide.scales.w.detach())
    expected = log_prior - posterior.log_prob(ZERO)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        result = bmr.reduce(guide, select=drop_all)
        torch.testing.assert_close(result.scores["w"], expected, rtol=0, atol=1e-4)
        assert result.delta_f == pytest.approx(float(expected.sum()), abs=1e-3)


def test_the_gaussian_of_all_rows_is_that_of_shrinkage():
    """`reduced_prior=Gaussian` needs location and scale of each row, not only the density."""
    pyro.set_rng_seed(0)
    guide = AutoNormal(one_plate)
    guide()
    options = {"reduced_prior": bmr.Gaussian(0.0, 0.5), "select": drop_all}
    result = bmr.reduce(guide, **options)
    loc, scale = guide.locs.w.detach(), guide.scales.w.detach()

    def whole():
        with pyro.plate("rows", 5):
            pyro.sample("w", dist.Normal(0.0, SCALES))

    pyro.clear_param_store()
    other = AutoNormal(whole)
    other()
    other.locs.w.data.copy_(loc)
    other.scales.w = scale
    expected = bmr.reduce(other, **options)
    assert result.delta_f == pytest.approx(expected.delta_f, abs=1e-4)


def test_a_sampled_scale_of_each_row():
    r"""E[ln N(0 | 0, s_i c_i)] = -ln(2π)/2 - ln c_i - E[ln s_i] for LogNormal posteriors."""
    pyro.set_rng_seed(0)

    def model():
        with pyro.plate("rows", 5, subsample_size=2) as index:
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("w", dist.Normal(0.0, s * SCALES[index]))

    guide = AutoNormal(model)
    guide()
    log_prior = -0.5 * math.log(2 * math.pi) - SCALES.log() - guide.locs.s.detach()
    posterior = dist.Normal(guide.locs.w.detach(), guide.scales.w.detach())
    result = bmr.reduce(guide, select=drop_all)
    expected = log_prior - posterior.log_prob(ZERO)
    torch.testing.assert_close(result.scores["w"], expected, rtol=0, atol=1e-4)


def test_measured_with_the_rows_of_the_data():
    """A random effect of each row, with a prior of its own: only what the data do not need goes."""
    pyro.set_rng_seed(0)
    y = torch.tensor([3.0, -3.0, 0.0, 0.0, 0.1])

    def model(y):
        with pyro.plate("rows", 5, subsample_size=2) as index:
            w = pyro.sample("w", dist.Normal(0.0, SCALES[index]))
            pyro.sample("y", dist.Normal(w, 0.3), obs=y[index])

    guide = AutoNormal(model, init_scale=0.3)
    guide(y)
    guide.locs.w.data.copy_(y)
    assert bmr.reduce(guide, y).masks["w"].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("index", [torch.tensor([0, 1]), torch.tensor([3, 4])])
def test_rows_that_the_arguments_choose_are_not_taken_for_all(index):
    def model(index):
        with pyro.plate("rows", 5, subsample=index) as rows:
            pyro.sample("w", dist.Normal(0.0, SCALES[rows]))

    guide = AutoNormal(model)
    guide(index)
    with pytest.warns(UserWarning, match=r"plate 'rows', of which only 2 of 5 rows"):
        result = bmr.reduce(guide)
    assert not result.masks
    everything = bmr.reduce(guide, torch.arange(5), select=drop_all)
    posterior = dist.Normal(guide.locs.w.detach(), guide.scales.w.detach())
    expected = dist.Normal(0.0, SCALES).log_prob(ZERO) - posterior.log_prob(ZERO)
    torch.testing.assert_close(everything.scores["w"], expected, rtol=0, atol=1e-4)


def test_a_prior_that_is_one_for_all_rows_is_seen_in_one_run():
    runs = []

    def model():
        runs.append(1)
        with pyro.plate("rows", 1000, subsample_size=2):
            pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))

    guide = AutoNormal(model)
    guide()
    del runs[:]
    assert bmr.reduce(guide).scores["w"].shape == (1000, 3)
    assert len(runs) < 10


@pytest.mark.parametrize("size", [1, 4])
def test_divergences_of_positive_sites_are_those_of_all_rows(size):
    rates = torch.linspace(0.5, 5.0, 12)
    y = torch.tensor([2.0] * 6 + [0.02] * 6)

    def model(y):
        with pyro.plate("rows", 12, subsample_size=size) as index:
            w = pyro.sample("w", dist.Exponential(rates[index]))
            pyro.sample("y", dist.Normal(w, 0.1), obs=y[index])

    def whole(y):
        with pyro.plate("rows", 12):
            w = pyro.sample("w", dist.Exponential(rates))
            pyro.sample("y", dist.Normal(w, 0.1), obs=y)

    pyro.set_rng_seed(0)
    guide, other = AutoNormal(model), AutoNormal(whole)
    guide(y)
    other(y)
    other.load_state_dict(guide.state_dict())
    options = {"sites": ["w"], "select": bmr.by_evidence()}
    expected = bmr.reduce(other, y, **options)
    for seed in range(2):
        pyro.set_rng_seed(seed)
        found = bmr.reduce(guide, y, **options)
        torch.testing.assert_close(found.scores["w"], expected.scores["w"], rtol=1e-5, atol=1e-5)
