"""What a group level takes, and what it refuses and how."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hierarchies import simulate

import pyro_bmr as bmr

STUDY = simulate(0)
POSTERIORS = STUDY.posteriors()
DESIGN = pd.DataFrame(STUDY.design, columns=["mean", "age"])


def posterior(mean, names, fixed=(), **given):
    scale = [0.0 if name in fixed else 0.3 for name in names]
    prior = [0.0 if name in fixed else 1.0 for name in names]
    return bmr.Posterior(mean, scale=scale, prior_scale=prior, names=names, **given)


def test_the_forms_of_a_design():
    expected = bmr.group_level(POSTERIORS, DESIGN)
    assert list(expected.design.columns) == ["mean", "age"]
    assert list(expected.design.index)[:2] == ["subject 1", "subject 2"]
    for design in (
        STUDY.design,
        torch.tensor(STUDY.design, dtype=torch.float32).double(),
        STUDY.design.tolist(),
        xr.DataArray(STUDY.design, dims=["subject", "covariate"]),
    ):
        found = bmr.group_level(POSTERIORS, design)
        np.testing.assert_allclose(
            found.posterior.mean, expected.posterior.mean, rtol=1e-5, atol=1e-6
        )
        assert list(found.design.columns) == ["mean", "covariate 2"]
    named = bmr.group_level(POSTERIORS, STUDY.design, names=["all", "years"])
    assert named.posterior.names[-1] == "B(2,1) × years"
    alone = bmr.group_level(POSTERIORS)
    assert list(alone.design.columns) == ["mean"]
    assert torch.equal(alone.posterior.mean, bmr.group_level(POSTERIORS, np.ones(6)).posterior.mean)


def test_a_table_is_matched_with_the_subjects():
    by_name = {f"sub-{i}": one for i, one in enumerate(POSTERIORS)}
    design = DESIGN.set_axis(list(by_name), axis=0)
    expected = bmr.group_level(POSTERIORS, DESIGN)
    shuffled = design.sample(frac=1.0, random_state=0)
    assert list(shuffled.index) != list(by_name)
    for given in (by_name, pd.Series(by_name)):
        found = bmr.group_level(given, shuffled)
        assert torch.equal(found.posterior.mean, expected.posterior.mean)
        assert list(found.design.index) == list(by_name) == list(found.first_levels)
    with pytest.raises(ValueError, match=r"\['sub-3'\] are in one only.*design.to_numpy\(\)"):
        bmr.group_level(by_name, design.drop(index="sub-3"))
    with pytest.raises(ValueError, match="index is not that of the posteriors"):
        bmr.group_level(by_name, DESIGN)
    with pytest.raises(ValueError, match="more than once"):
        bmr.group_level(by_name, pd.concat([design, design]))


def test_designs_that_are_refused():
    constant, other = STUDY.design.T
    double = np.c_[constant, other, other - 2 * constant]
    names = ["mean", "age", "age - 2"]
    with pytest.raises(ValueError, match=r"\['mean', 'age', 'age - 2'\] depend on each other"):
        bmr.group_level(POSTERIORS, double, names=names)
    twice = np.c_[constant, other, 1e6 * other]
    with pytest.raises(ValueError, match=r"\['age', 'age - 2'\] depend on each other"):
        bmr.group_level(POSTERIORS, twice, names=names)
    with pytest.raises(ValueError, match=r"\['covariate 2'\] are zero for every subject"):
        bmr.group_level(POSTERIORS, np.c_[constant, 0 * other])
    with pytest.raises(ValueError, match="no more covariates than subjects"):
        bmr.group_level(POSTERIORS, np.random.default_rng(0).normal(size=(6, 7)))
    with pytest.raises(ValueError, match="a row for each of the 6 subjects"):
        bmr.group_level(POSTERIORS, STUDY.design[:5])
    with pytest.raises(ValueError, match="NaN or infinite"):
        bmr.group_level(POSTERIORS, DESIGN.replace(1.0, np.nan))
    with pytest.raises(ValueError, match="columns that are no numbers"):
        bmr.group_level(POSTERIORS, DESIGN.assign(site="a"))
    with pytest.raises(ValueError, match="2 names that differ"):
        bmr.group_level(POSTERIORS, STUDY.design, names=["a", "a"])


def test_a_design_without_a_constant():
    with pytest.warns(UserWarning, match="Add a column of ones"):
        result = bmr.group_level(POSTERIORS, DESIGN[["age"]])
    assert not result.posterior.prior_mean.any()
    groups = np.repeat(np.eye(2), 3, axis=0)
    prior = bmr.group_level(POSTERIORS, groups).posterior.prior_mean
    np.testing.assert_allclose(prior, np.tile(STUDY.prior_mean, 2))


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, ["A(1,1)", "B(1,1)", "A(2,1)", "B(2,1)"]),
        ("A", ["A(1,1)", "A(2,1)"]),
        ("B(1,1)", ["B(1,1)"]),
        (["B", "A(2,1)"], ["B(1,1)", "A(2,1)", "B(2,1)"]),
        ("*(2,?)", ["A(2,1)", "B(2,1)"]),
    ],
)
def test_parameters_are_chosen(parameters, expected):
    result = bmr.group_level(POSTERIORS, DESIGN, parameters=parameters)
    assert list(result.parameters) == expected
    covariates = ("mean", "age")
    assert result.posterior.names == tuple(f"{p} × {c}" for c in covariates for p in expected)


def test_arrays_by_site():
    """Elements of arrays are parameters, and posteriors keep their sites and coordinates."""
    a = xr.DataArray(np.zeros((2, 2)), coords={"to": ["V1", "V5"], "from": ["V1", "V5"]})
    posteriors = [
        bmr.Posterior({"A": a + i / 10, "c": 1.0}, scale=0.3, prior_scale=1.0) for i in range(4)
    ]
    result = bmr.group_level(posteriors, parameters="A[V5,*]")
    assert result.parameters == ("A[V5,V1]", "A[V5,V5]")
    refit = result.first_levels["subject 4"]
    assert refit.names == posteriors[0].names
    assert refit.layout.shapes == posteriors[0].layout.shapes


def test_components():
    def found(components):
        return bmr.group_level(POSTERIORS, DESIGN, components=components)

    assert found("single").log_precisions.names == ("all",)
    fields = found("fields")
    assert fields.log_precisions.names == ("A", "B")
    assert found("all").log_precisions.names == tuple(STUDY.names)
    own = found({"ay": ["A(1,1)", "A(2,1)"], "bee": "B"})
    assert own.log_precisions.names == ("ay", "bee")
    assert own.free_energy == pytest.approx(fields.free_energy)
    held = bmr.group_level(POSTERIORS, DESIGN, log_precisions=0.5).log_precisions
    assert held.mean.tolist() == [0.5]
    assert not held.free.any()
    with pytest.raises(ValueError, match=r"\['A\(1,1\)'\] in exactly one of them"):
        found({"ay": "A(2,1)", "bee": "B"})
    with pytest.raises(ValueError, match=r"'single', 'fields', 'all', a mapping"):
        found("none")


def test_missing_parameters_are_named():
    ab, a = ["A(1,1)", "B(1,1)"], ["A(1,1)"]
    posteriors = {"ann": posterior([1.0, 2.0], ab), "bob": posterior([1.0], a)}
    told = r"'bob' has no 'B\(1,1\)'. Expected .* or parameters= that all subjects have"
    for parameters in (None, "B", "B(1,1)"):
        with pytest.raises(ValueError, match=told):
            bmr.group_level(posteriors, parameters=parameters)
    assert bmr.group_level(posteriors, parameters="A").parameters == ("A(1,1)",)
    with pytest.raises(ValueError, match="'C'. Expected a name, a field or a pattern"):
        bmr.group_level(posteriors, parameters="C")


def test_fixed_parameters():
    names = ["A(1,1)", "A(1,2)", "A(2,1)"]
    rng = np.random.default_rng(0)
    posteriors = [
        posterior(rng.normal(size=3), names, {"A(1,2)", *(["A(2,1)"] if i < 2 else [])})
        for i in range(5)
    ]
    result = bmr.group_level(posteriors, parameters="A")
    assert result.parameters == ("A(1,1)", "A(2,1)")
    with pytest.raises(ValueError, match=re.escape("'A(1,2)'. Expected parameters with a")):
        bmr.group_level(posteriors, parameters="A(1,2)")
    # The first two say nothing about the last: without them it is the same.
    few = bmr.group_level(posteriors[2:], parameters="A(2,1)", log_precisions=0.0)
    every = bmr.group_level(posteriors, parameters="A(2,1)", log_precisions=0.0)
    torch.testing.assert_close(every.posterior.mean, few.posterior.mean)
    assert every.delta_f == pytest.approx(few.delta_f, abs=1e-10)
    untouched = every.first_levels["subject 1"]
    assert torch.equal(untouched.mean, posteriors[0].mean)
    assert every.first_level_delta_f["subject 1"] == pytest.approx(0.0, abs=1e-12)


def test_posteriors_that_are_refused():
    with pytest.raises(TypeError, match="a pyro_bmr.Posterior"):
        bmr.group_level([POSTERIORS[0], "bob"])
    with pytest.raises(TypeError, match="one for each of several subjects"):
        bmr.group_level(POSTERIORS[0])
    with pytest.raises(ValueError, match="at least one subject"):
        bmr.group_level([])
    bare = bmr.Posterior([1.0], scale=[1.0], names=["A"])
    with pytest.raises(ValueError, match="'subject 1', prior_covariance=None. Expected the prior"):
        bmr.group_level([bare, bare])
    wide = bmr.Posterior([1.0], scale=[9.0], prior_scale=1.0, names=["A"])
    with pytest.raises(ValueError, match=r"\['subject 2'\] are so much wider"):
        bmr.group_level([posterior([0.0], ["A"]), wide], log_precisions=-4.0)
    root = np.array([[1.0], [1.0]])
    flat = bmr.Posterior(
        [1.0, 1.0], 0.1 * root @ root.T, prior_covariance=root @ root.T, names=["A", "B"]
    )
    with pytest.raises(ValueError, match="'subject 2' is singular in another way"):
        bmr.group_level([posterior([0.0, 0.0], ["A", "B"]), flat])


def test_priors_that_are_refused():
    with pytest.raises(ValueError, match="beta=0"):
        bmr.GroupPrior(beta=0)
    with pytest.raises(TypeError, match="a pyro_bmr.GroupPrior"):
        bmr.group_level(POSTERIORS, prior=16.0)
    for prior, told in (
        (bmr.GroupPrior(mean=[1.0, 2.0]), "a number for each of the 4 parameters"),
        (bmr.GroupPrior(mean={"A": 1.0}), "a number for each of"),
        (bmr.GroupPrior(between=np.eye(3)), r"a matrix of shape \(4, 4\)"),
        (bmr.GroupPrior(covariance=-np.eye(4)), "symmetric and positive definite"),
    ):
        with pytest.raises(ValueError, match=told):
            bmr.group_level(POSTERIORS, prior=prior)
    with pytest.raises(ValueError, match="a number for each of the 1 components"):
        bmr.group_level(POSTERIORS, log_precisions=[0.0, 1.0])


def test_nothing_is_touched():
    state = torch.get_rng_state()
    before = [(one.mean.clone(), one.covariance.clone()) for one in POSTERIORS]
    design = STUDY.design.copy()
    bmr.group_level(POSTERIORS, STUDY.design, components="all").leave_one_out()
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(design, STUDY.design)
    for one, (mean, covariance) in zip(POSTERIORS, before, strict=True):
        assert torch.equal(one.mean, mean)
        assert torch.equal(one.covariance, covariance)


def test_how_it_prints():
    result = bmr.group_level(POSTERIORS, DESIGN)
    text = repr(result)
    for part in ("6 subjects", f"F = {result.free_energy:,.2f} nats", "effects of age", "P(> 0)"):
        assert part in text
    assert result._repr_html_().count("<table") == 2
    frame = result.summary()
    assert frame.index.names == ["covariate", "parameter"]
    z = frame["mean"] / frame["sd"]
    assert ((frame["P(> 0)"] > 0.5) == (z > 0)).all()
    unknown = bmr.group_level(STUDY.posteriors(with_f=False), DESIGN)
    assert unknown.free_energy is None
    assert unknown.delta_f == pytest.approx(result.delta_f)
    assert unknown.first_levels["subject 1"].free_energy is None


def test_first_levels_wider_than_their_priors():
    def make(variance, prior=1.0):
        return bmr.Posterior(
            [0.1, 0.1], variance * np.eye(2), prior_covariance=prior * np.eye(2), names=["a", "b"]
        )

    with pytest.raises(ValueError, match=r"\['subject 1', .*\] are wider than their priors"):
        bmr.group_level([make(2.0)] * 4)
    with pytest.warns(UserWarning, match=r"posteriors of 'subject 5' are wider than their priors"):
        bmr.group_level([make(0.1)] * 4 + [make(1.1)])
    with pytest.warns(UserWarning, match=r"prior variances of 'a', 'b' differ between subjects"):
        bmr.group_level([make(0.1)] * 4 + [make(0.1, 20.0)])
    with warnings.catch_warnings(action="error"):
        bmr.group_level([make(0.1)] * 4 + [make(1.0), make(0.1, 9.0)])
