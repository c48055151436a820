"""Covariates of subjects that were left out, against the joint Gaussian of all data."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hierarchies import simulate
from scipy.stats import multivariate_normal, norm, ttest_ind

import pyro_bmr as bmr


def study(seed=0, subjects=8, scale=1.0):
    group = np.tile([1.0, -1.0], subjects // 2)
    age = np.random.default_rng(seed).normal(size=subjects)
    design = np.c_[np.ones(subjects), age, group]
    effects = scale * np.array([0.3, 0.3, 0.3, 0.2, -0.1, 0.0, 0.8, -0.6, 0.4])
    return simulate(seed, subjects, size=3, design=design, effects=effects, prior=np.eye(3))


@pytest.mark.parametrize("covariate", ["age", "group"])
def test_predictions(covariate):
    """Predictive densities of a subject's data, given those of the others, on a wide grid."""
    found = study()
    names = ["mean", "age", "group"]
    result = bmr.group_level(found.posteriors(), found.design, names=names, log_precisions=0.2)
    left_out = result.leave_one_out(covariate)
    column = names.index(covariate)
    prior = found.effect_prior()
    parts = [list(range(3))]
    between = found.between([0.2], parts)
    for i in range(0, len(found.data), 3):
        rest = found.without(i)
        _, mean, covariance = rest.solve([0.2], parts, *prior)

        def likelihood(x, i=i, mean=mean, covariance=covariance):
            row = found.design[i].copy()
            row[column] = x
            slope = found.inputs[i] @ np.kron(row, np.eye(3))
            own, within = found.group_prior(i, np.zeros(3), between)
            spread = slope @ covariance @ slope.T + np.eye(len(slope))
            spread += found.inputs[i] @ within @ found.inputs[i].T
            at = found.inputs[i] @ own + slope @ mean
            return multivariate_normal(at, spread).logpdf(found.data[i])

        known = rest.design[:, column]
        wide = norm(known.mean(), 2 * known.std(ddof=1))
        grid = np.linspace(*wide.interval(1 - 1e-12), 401)
        density = np.array([likelihood(x) for x in grid]) + wide.logpdf(grid)
        weight = np.exp(density - density.max())
        weight /= weight.sum()
        row = left_out.predictions.iloc[i]
        middle = weight @ grid
        assert row["predicted"] == pytest.approx(middle, abs=1e-5)
        assert row["sd"] == pytest.approx((weight @ (grid - middle) ** 2) ** 0.5, abs=1e-5)
        assert row["actual"] == found.design[i, column]
        if covariate == "group":
            odds = likelihood(1.0) - likelihood(-1.0)
            chance = left_out.probability.loc[f"subject {i + 1}", 1.0]
            assert chance == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-8)
    assert (left_out.probability is None) == (covariate == "age")


def test_what_is_learned_without_a_subject():
    """The log precisions are fitted to the others alone."""
    found = study(1)
    prior = bmr.GroupPrior(log_precision_variance=4.0)
    left_out = bmr.group_level(found.posteriors(), found.design, prior=prior).leave_one_out()
    rest = found.without(2)
    fitted = bmr.group_level(rest.posteriors(), rest.design, prior=prior)
    held = fitted.log_precisions.mean
    # The priors of effects are scaled by all subjects' covariates.
    alone = bmr.group_level(found.posteriors(), found.design, prior=prior, log_precisions=held)
    expected = alone.leave_one_out().predictions.loc["subject 3"]
    assert left_out.predictions.loc["subject 3", "predicted"] == pytest.approx(
        expected["predicted"], abs=0.02
    )
    assert left_out.covariate == "covariate 2"


def test_a_group_that_differs_is_found_and_one_that_does_not_is_not():
    p_values = []
    for scale in (2.0, 0.0):
        found = study(2, subjects=16, scale=scale)
        left_out = bmr.group_level(found.posteriors(), found.design).leave_one_out("covariate 3")
        table = left_out.predictions
        ones = table["actual"] == 1
        exact = ttest_ind(
            table["predicted"][ones], table["predicted"][~ones], alternative="greater"
        )
        assert left_out.p_value == pytest.approx(exact.pvalue)
        assert left_out.correlation == pytest.approx(
            np.corrcoef(table["actual"], table["predicted"])[0, 1]
        )
        np.testing.assert_allclose(left_out.probability.sum(axis=1), 1.0)
        p_values.append(left_out.p_value)
    assert p_values[0] < 1e-3 < 0.05 < p_values[1]


def test_the_figure_and_the_table():
    found = study()
    names = ["mean", "age", "group"]
    result = bmr.group_level(found.posteriors(), found.design, names=names)
    for covariate in ("age", "group"):
        left_out = result.leave_one_out(covariate)
        ax = left_out.plot()
        assert ax.get_xlabel() == covariate
        points = [line for line in ax.lines if line.get_marker() in {"o", "s"}]
        assert sum(len(line.get_xdata()) for line in points) == 8
        assert "correlation" in ax.get_title(loc="left")
        plt.close(ax.figure)
    assert list(left_out.summary()) == ["actual", "predicted", "sd", "P(-1)", "P(1)"]
    assert "subject 8" in repr(left_out)
    with pytest.raises(TypeError, match="axes to draw on"):
        left_out.plot("here")


def test_what_cannot_be_left_out():
    found = study()
    posteriors = found.posteriors()
    with pytest.raises(ValueError, match="a covariate that is not constant"):
        bmr.group_level(posteriors).leave_one_out()
    result = bmr.group_level(posteriors, found.design)
    with pytest.raises(ValueError, match="one of the covariates that vary"):
        result.leave_one_out("mean")
    lone = pd.DataFrame({"mean": 1.0, "patient": np.eye(8)[3]})
    with pytest.raises(ValueError, match="without 'subject 4', the covariates"):
        bmr.group_level(posteriors, lone).leave_one_out()
