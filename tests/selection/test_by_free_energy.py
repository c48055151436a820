"""The measured selection: exact posteriors, options, and that F never rises."""

import copy
import math
from functools import partial
from pathlib import Path

import never_worse
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_regression import ObservedRegression
from often import often
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyro_bmr as bmr
from pyro_bmr.selection import by_free_energy as search

QUIET = {"progress": False}
# Whether inputs are collinear, and the kind of guide.
EXACT = {
    "dense": (False, "dense"),
    "low rank": (False, "low_rank"),
    "collinear": (True, "dense"),
    "independent": (False, "diagonal"),
}
SEEDS = range(4)
MANY_SEEDS = range(4, 20)


def exact(name):
    collinear, kind = EXACT[name]
    problem = ObservedRegression(rows=60, collinear=collinear)
    return problem, getattr(problem, kind)()


@pytest.mark.parametrize("seeds", [SEEDS, pytest.param(MANY_SEEDS, marks=pytest.mark.rare)])
@pytest.mark.parametrize("name", EXACT)
def test_measuring_an_exact_posterior_changes_nothing(name, seeds):
    problem, guide = exact(name)
    expected = bmr.reduce(guide)
    assert not expected.masks["w"].all()
    for seed in seeds:
        select = bmr.by_free_energy(seed=seed, **QUIET)
        result = bmr.reduce(guide, *problem.data, select=select)
        assert torch.equal(result.masks["w"], expected.masks["w"]), seed
    assert result.delta_f == pytest.approx(expected.delta_f)
    assert abs(result.realised - result.delta_f) < 4 * result.realised_error + 0.05


def test_without_data():
    problem, guide = exact("independent")
    with pytest.raises(ValueError, match="by_free_energy has nothing to measure"):
        bmr.reduce(guide, select=bmr.by_free_energy())
    assert bmr.reduce(guide).realised is None
    assert "predicted, not measured" in str(bmr.reduce(guide))


def test_a_model_that_observes_nothing():
    def model(x):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    x = torch.ones(3)
    guide = AutoNormal(model, init_scale=0.1)
    guide(x)
    result = bmr.reduce(guide, x)
    assert result.realised is None
    assert any(note.startswith("not measured: the model observes nothing") for note in result.notes)
    with pytest.raises(ValueError, match="nothing to measure"):
        bmr.reduce(guide, x, select=bmr.by_free_energy())


@pytest.mark.parametrize("likelihood", [dist.Poisson, partial(dist.Normal, scale=1.0)])
def test_data_that_were_forgotten(likelihood):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("rows", len(x)):
            rate = pyro.deterministic("rate", (x @ w).exp())
            pyro.sample("y", likelihood(rate), obs=y)

    x = torch.ones(5, 3)
    guide = AutoNormal(model, init_scale=0.1)
    guide(x, torch.ones(5))
    (note,) = (one for one in bmr.reduce(guide, x).notes if one.startswith("not measured"))
    assert "arguments; did you forget to pass the data for 'y'? its sites" in note


def test_data_with_nan():
    problem, guide = exact("independent")
    y = problem.y.clone()
    y[3] = math.nan
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="NaN or infinite"):
        bmr.reduce(guide, problem.x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 3}, "num_samples=3. Expected a whole number, 4 or more"),
        ({"num_samples": 8.0}, "num_samples=8.0. Expected a whole number"),
        ({"batch_size": 0}, "batch_size=0. Expected a whole number, 1 or more"),
        ({"effort": 0}, "effort=0. Expected a whole number, 1 or more"),
        ({"margin": math.nan}, "margin"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        bmr.by_free_energy(**options)


@pytest.mark.parametrize(
    ("name", "margin"),
    [("dense", 1.0), *(("independent", margin) for margin in (-2.0, 0.0, 1.0, 2.0, 20.0))],
)
def test_the_margin_is_that_of_by_evidence(name, margin):
    problem, guide = exact(name)
    expected = bmr.reduce(guide, select=bmr.by_evidence(margin)).masks["w"]
    select = bmr.by_free_energy(margin, **QUIET)
    assert torch.equal(bmr.reduce(guide, *problem.data, select=select).masks["w"], expected)


def untrained():
    """As in the docstring: the evidence knows nothing of the data."""
    problem = ObservedRegression()
    start = init_to_value(values={"w": torch.full((6,), 0.2, dtype=torch.float64)})
    guide = AutoNormal(problem.model, init_loc_fn=start, init_scale=0.3)
    guide()
    return problem, guide


def test_no_selection_is_by_evidence_without_data_and_by_free_energy_with():
    problem, guide = untrained()
    without, measured = bmr.reduce(guide), bmr.reduce(guide, *problem.data)
    by_evidence = bmr.reduce(guide, select=bmr.by_evidence())
    by_free_energy = bmr.reduce(guide, *problem.data, select=bmr.by_free_energy())
    assert torch.equal(without.masks["w"], by_evidence.masks["w"])
    assert torch.equal(measured.masks["w"], by_free_energy.masks["w"])
    assert not torch.equal(without.masks["w"], measured.masks["w"])
    assert measured.realised <= 0


@pytest.mark.parametrize("options", [{}, {"batch_size": 5, "num_samples": 512}])
def test_an_untrained_guide_is_measured_exactly(options):
    """In closed form: of all sets, that is the best, or close to it."""
    problem, guide = untrained()
    loc, scale = guide.locs.w.detach(), guide.scales.w.detach()

    def free_energy(keep):
        residual = (problem.y - problem.x @ (loc * keep)).square().sum()
        residual = residual + (problem.x.square() @ (scale * keep).square()).sum()
        divergence = -scale.log() + (scale.square() + loc.square() - 1) / 2
        return 0.5 * residual / problem.noise**2 + (divergence * keep).sum()

    select = bmr.by_free_energy(**options, **QUIET)
    result = bmr.reduce(guide, *problem.data, select=select)
    masks = torch.cartesian_prod(*[torch.tensor([False, True])] * 6)
    best = min(free_energy(keep) for keep in masks)
    full = free_energy(torch.ones(6))
    change = free_energy(result.masks["w"]) - full
    assert change <= 0.9 * (best - full)
    assert abs(result.realised - change) < 4 * result.realised_error + 0.05


def test_what_is_selected_otherwise_is_measured_too():
    problem, guide = exact("independent")
    result = bmr.reduce(guide, *problem.data, select=bmr.by_evidence())
    assert abs(result.realised - result.delta_f) < 4 * result.realised_error + 0.05
    (row,) = result.sites
    assert row.realised == pytest.approx(result.realised)
    all_of_it = bmr.reduce(guide, *problem.data, select=bmr.top_k(0))
    assert all_of_it.realised > 10
    nothing = bmr.reduce(guide, *problem.data, select=bmr.top_k(6))
    assert (nothing.realised, nothing.realised_error) == (0.0, 0.0)


def test_data_as_keywords():
    problem, guide = untrained()
    x, y = problem.data
    by_position = bmr.reduce(guide, x, y)
    by_name = bmr.reduce(guide, kwargs={"x": x, "y": y})
    assert torch.equal(by_position.masks["w"], by_name.masks["w"])
    assert by_name.realised == pytest.approx(by_position.realised)


def test_reproducible_and_nothing_outside_is_changed():
    problem, guide = untrained()
    before, state = copy.deepcopy(guide.state_dict()), torch.get_rng_state()
    first = bmr.reduce(guide, *problem.data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    torch.rand(3)
    second = bmr.reduce(guide, *problem.data)
    assert torch.equal(first.masks["w"], second.masks["w"])
    assert (first.realised, first.realised_error) == (second.realised, second.realised_error)


TANH_NORMAL = 4


@pytest.mark.parametrize("groups", [bmr.units, [bmr.units, bmr.elements]], ids=["units", "both"])
def test_groups(groups):
    case = never_worse.make_case(TANH_NORMAL)
    select = bmr.by_free_energy(**QUIET)
    result = bmr.reduce(case.guide, *case.args, groups=groups, select=select)
    assert result.sparsity > 0 and result.layers
    assert not never_worse.rose(*never_worse.measure(case, result, num_samples=30))
    # A unit goes whole.
    gone = ~result.masks["w1"][:, 0] & ~result.masks["b0"]
    assert gone.any() and not result.masks["w0"][:, gone].any()


def test_the_sites_add_up():
    case = never_worse.make_case(TANH_NORMAL)
    result = never_worse.reduce(case)
    rows = [row.realised for row in result.sites]
    assert sum(rows) == pytest.approx(result.realised, rel=1e-6)
    assert sum(value != 0 for value in rows) > 1
    assert result.summary()["realised"].sum() == pytest.approx(result.realised, rel=1e-6)
    assert f"realised {result.realised:+.2f} ± {result.realised_error:.2f} nats" in str(result)


@pytest.mark.parametrize("name", ["dense", "independent"])
def test_a_gaussian_reduced_prior(name):
    problem, guide = exact(name)
    prior = bmr.Gaussian(0.0, 0.1)
    predicted = bmr.reduce(guide, reduced_prior=prior)
    result = bmr.reduce(guide, *problem.data, reduced_prior=prior)
    assert result.shrunk and torch.equal(result.masks["w"], predicted.masks["w"])
    assert abs(result.realised - result.delta_f) < 4 * result.realised_error + 0.05


def test_a_gaussian_reduced_prior_of_an_untrained_guide():
    problem, guide = untrained()
    result = bmr.reduce(guide, *problem.data, reduced_prior=bmr.Gaussian(0.0, 0.1))
    assert result.realised <= 3 * result.realised_error
    audit = result.audit(*problem.data, progress=False).total
    assert audit.realised <= 3 * audit.error


# All models and guides, and all steps but 1000, in the cases that are fast.
# benchmarks/never_worse.py has 200.
FAST = [3, 4, 5, 6, 7, 8, 13, 22, 30]


@pytest.mark.parametrize("number", often(FAST, 3, 5, 8, 22))
def test_f_never_rises(number):
    case = never_worse.make_case(number)
    delta_f, error = never_worse.measure(case, never_worse.reduce(case), num_samples=30)
    assert not never_worse.rose(delta_f, error), (delta_f, error)


TRAINED = 16


def test_a_search_that_accepts_everything_fails_the_same_check(monkeypatch):
    def accept(self, kept, goal, doubt):
        self.trials.measure(self._elements(kept))
        self._accept(kept)
        return True

    monkeypatch.setattr(search._Search, "_try_keeping", accept)
    monkeypatch.setattr(search._Search, "confirmed", lambda self, seed: self._masks(self.kept))
    case = never_worse.make_case(TRAINED)
    assert never_worse.rose(*never_worse.measure(case, never_worse.reduce(case), num_samples=30))


def test_a_model_of_which_nothing_can_be_reduced():
    def model(y):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    y = torch.randn(10)
    guide = AutoNormal(model)
    guide(y)
    with pytest.warns(UserWarning, match="no site of this guide can be reduced"):
        result = bmr.reduce(guide, y)
    assert (result.masks, result.delta_f, result.realised) == ({}, 0.0, 0.0)
    with (
        pytest.warns(UserWarning, match="no site of this guide can be reduced"),
        pytest.raises(ValueError, match="nothing to measure"),
    ):
        bmr.reduce(guide, select=bmr.by_free_energy())


def test_data_made_in_inference_mode():
    problem, guide = untrained()
    expected = bmr.reduce(guide, *problem.data)
    with torch.inference_mode():
        data = tuple(one.clone() for one in problem.data)
        result = bmr.reduce(guide, *data)
    for got in (result, bmr.reduce(guide, *data)):
        assert torch.equal(got.masks["w"], expected.masks["w"])
        assert got.realised == pytest.approx(expected.realised)


def test_a_reduction_can_be_reduced_again_with_data():
    """What is gone stays, and F falls no less."""
    problem, guide = untrained()
    half = bmr.reduce(guide, *problem.data, select=bmr.top_k(4))
    result = bmr.reduce(half.guide, *problem.data)
    assert not (result.masks["w"] & ~half.masks["w"]).any()
    assert result.realised <= 0
    nothing = bmr.reduce(bmr.reduce(guide, select=bmr.top_k(0)).guide, *problem.data)
    assert (nothing.realised, nothing.realised_error) == (0.0, 0.0)


def test_a_sub_sampling_plate():
    problem, _ = untrained()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(problem.loc, problem.scale).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, problem.noise), obs=y[rows])

    pyro.clear_param_store()
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"w": problem.posterior()[0]}))
    guide(*problem.data)
    guide.scales.w = problem.diagonal().scales.w.detach()
    expected = bmr.reduce(problem.diagonal()).masks["w"]
    result = bmr.reduce(guide, *problem.data)
    assert torch.equal(result.masks["w"], expected)


@pytest.mark.parametrize("effort", [1, 3])
def test_little_effort_does_not_raise_f(effort):
    problem, guide = untrained()
    result = bmr.reduce(guide, *problem.data, select=bmr.by_free_energy(effort=effort, **QUIET))
    assert result.realised <= 3 * result.realised_error


def test_f_rose_in_none_of_the_cases_of_the_benchmark():
    table = pd.read_csv(Path(__file__).parents[2] / "benchmarks" / "never_worse.csv")
    assert list(table["case"]) == list(range(200))
    risen = map(never_worse.rose, table["realised"], table["error"])
    assert not any(risen)
