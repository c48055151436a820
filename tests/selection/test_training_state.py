"""Notes on whether the guide has been trained."""

import pyro
import pytest
import torch
from exact_regression import ObservedRegression
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

import pyro_bmr as bmr


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("kind", ["dense", "low_rank", "diagonal"])
def test_nothing_to_say_of_an_exact_posterior(kind, with_data):
    problem = ObservedRegression()
    guide = getattr(problem, kind)()
    args = problem.data if with_data else ()
    assert bmr.reduce(guide, *args).notes == ()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_to_say_of_the_optimum_of_an_independent_guide(seed):
    pyro.set_rng_seed(seed)
    problem = ObservedRegression()
    assert bmr.reduce(problem.diagonal(), *problem.data).notes == ()


def test_an_untrained_guide_with_data():
    problem = ObservedRegression()
    guide = AutoNormal(problem.model, init_scale=0.1)
    guide()
    (note,) = bmr.reduce(guide, *problem.data).notes
    assert note.startswith("F still falls by ") and "train the guide on" in note
    assert note in str(bmr.reduce(guide, *problem.data)).replace("\n", " ")


def test_an_untrained_guide_without_data():
    guide = AutoNormal(ObservedRegression().model, init_scale=0.1)
    guide()
    (note,) = bmr.reduce(guide).notes
    assert note == "all posterior scales of w are equal, as before any training"


def test_wide_scales_without_data():
    problem = ObservedRegression()
    guide = AutoNormal(problem.model, init_loc_fn=init_to_value(values={"w": problem.loc}))
    guide()
    guide.scales.w = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.5, 2.0], dtype=torch.float64)
    (note,) = bmr.reduce(guide).notes
    assert note.startswith("2 of 6 posterior scales are over 5 % wider than their prior")


def test_trained_by_hand_the_note_goes():
    problem = ObservedRegression()
    guide = AutoNormal(problem.model, init_scale=0.1)
    guide()
    data = problem.data
    assert bmr.reduce(guide, *data).notes
    loc, covariance = problem.posterior()
    guide.locs.w, guide.scales.w = loc, covariance.inverse().diagonal().rsqrt()
    assert not bmr.reduce(guide, *data).notes


def test_guides_of_other_families_have_none_of_equal_scales():
    guide = AutoMultivariateNormal(ObservedRegression().model, init_scale=0.1)
    guide()
    assert bmr.reduce(guide).notes == ()


@pytest.mark.parametrize(("steps", "told"), [(1.6, False), (4.0, True)])
def test_where_nothing_is_promised_a_nat_or_two_are_left_to_train(steps, told):
    """Off by so much that F is as many nats above its optimum, with nothing left to drop."""
    problem = ObservedRegression()
    loc, covariance = problem.posterior()
    keep = torch.tensor([True] * 3 + [False] * 3)
    result = bmr.reduce(problem.diagonal(), *problem.data, select=lambda _: {"w": keep})
    precision = covariance.inverse()[:3, :3]
    kept = torch.linalg.solve(precision, (covariance.inverse() @ loc)[:3])
    away = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    away = away * (2 * steps / precision[0, 0]).sqrt()
    result.guide.parts[0].loc_unconstrained.data[:3] = kept + away
    again = bmr.reduce(result.guide, *problem.data)
    assert again.delta_f == 0
    if told:
        (note,) = again.notes
        assert "F still falls by" in note and "promises" not in note
    else:
        assert again.notes == ()
