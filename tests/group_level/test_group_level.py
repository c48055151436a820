"""The group level against the joint Gaussian of all data, in numpy."""

import hierarchies
import numpy as np
import pandas as pd
import pytest
import torch
from hierarchies import simulate
from scipy.optimize import minimize

import pyro_bmr as bmr

CASES = {
    "plain": {},
    "others keep their prior": {"size": 5, "chosen": 3},
    "absent in some": {"absent": [(0, 1), (3, 1), (3, 2), (5, 0)]},
    "absent and others": {"size": 5, "chosen": 3, "absent": [(1, 0), (2, 4), (4, 2)]},
    "two groups": {"design": np.repeat(np.eye(2), 3, axis=0)},
    "a scaled constant": {"design": np.c_[np.arange(6.0) - 2.5, np.full(6, 2.0)]},
}
PARTS = {
    "single": lambda k: [list(range(k))],
    "fields": lambda k: [list(range(0, k, 2)), list(range(1, k, 2))],
    "all": lambda k: [[i] for i in range(k)],
}


def fit(study, **given):
    chosen = study.names[: study.chosen]
    return bmr.group_level(study.posteriors(), study.design, parameters=chosen, **given)


@pytest.mark.parametrize("components", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_effects_and_evidence_at_given_hyperparameters(case, components):
    study = simulate(1, **CASES[case])
    if case.startswith("absent"):  # averages over subjects of other sets are no longer the prior
        study.prior = np.diag(study.prior.diagonal())
        study = simulate(1, prior=study.prior, **CASES[case])
    parts = PARTS[components](study.chosen)
    gamma = np.linspace(-1.0, 0.7, len(parts))
    evidence, mean, covariance = study.solve(gamma, parts, *study.effect_prior())
    result = fit(study, components=components, log_precisions=gamma)
    np.testing.assert_allclose(result.posterior.mean, mean, atol=1e-8)
    np.testing.assert_allclose(result.posterior.covariance, covariance, atol=1e-8)
    assert result.free_energy == pytest.approx(-evidence, abs=1e-6)
    assert result.posterior.free_energy == result.free_energy
    first = sum(one.free_energy for one in study.posteriors())
    assert result.delta_f == pytest.approx(-evidence - first, abs=1e-6)
    prior_mean, prior_covariance = study.effect_prior()
    np.testing.assert_allclose(result.posterior.prior_mean, prior_mean, atol=1e-12)
    np.testing.assert_allclose(result.posterior.prior_covariance, prior_covariance, atol=1e-12)
    np.testing.assert_allclose(result.between_covariance, study.between(gamma, parts), atol=1e-12)


@pytest.mark.parametrize("components", PARTS)
@pytest.mark.parametrize("variance", [1 / 16, 4.0])
def test_the_best_hyperparameters(components, variance):
    study = simulate(2, subjects=10, rows=4, log_precisions=[-1.0, 0.5, -2.0, 1.0])
    parts = PARTS[components](study.chosen)
    prior = study.effect_prior()

    def loss(gamma):
        return -study.solve(gamma, parts, *prior)[0] + gamma @ gamma / (2 * variance)

    best = minimize(loss, np.zeros(len(parts)), method="BFGS", options={"gtol": 1e-4})
    result = fit(
        study, components=components, prior=bmr.GroupPrior(log_precision_variance=variance)
    )
    found = result.log_precisions.mean.numpy()
    np.testing.assert_allclose(found, best.x, atol=1e-3)
    assert loss(found) <= best.fun + 1e-8

    curvature = hessian(loss, found)
    np.testing.assert_allclose(
        np.linalg.inv(result.log_precisions.covariance), curvature, rtol=1e-3, atol=1e-3
    )
    laplace = loss(found) + (np.linalg.slogdet(curvature)[1] + len(parts) * np.log(variance)) / 2
    assert result.free_energy == pytest.approx(laplace, abs=1e-4)


def hessian(function, at, step=1e-3):
    steps = step * np.eye(len(at))
    return np.array(
        [
            [
                (
                    function(at + one + other)
                    - function(at + one - other)
                    - function(at - one + other)
                    + function(at - one - other)
                )
                / (4 * step**2)
                for other in steps
            ]
            for one in steps
        ]
    )


@pytest.mark.parametrize("case", CASES)
def test_first_levels_under_the_prior_of_the_group(case):
    given = dict(CASES[case])
    if "absent" in given:
        given["prior"] = np.diag(np.linspace(0.5, 1.0, given.get("size", 4)))
    study = simulate(3, **given)
    result = fit(study, components="fields")
    effects = result.posterior.mean.numpy()
    for i, (subject, refit) in enumerate(result.first_levels.items()):
        own = np.kron(study.design[i], np.eye(study.chosen)) @ effects
        mean, prior = study.group_prior(i, own, result.between_covariance.numpy())
        h, y, free = study.inputs[i], study.data[i], study.free[i]
        marginal = h @ prior @ h.T + np.eye(len(y))
        gain = np.linalg.solve(marginal, h @ prior).T
        evidence = hierarchies.multivariate_normal(h @ mean, marginal).logpdf(y)
        assert refit.free_energy == pytest.approx(-evidence, abs=1e-7)
        before = study.posteriors()[i].free_energy
        assert result.first_level_delta_f[subject] == pytest.approx(-evidence - before, abs=1e-7)
        exact = mean + gain @ (y - h @ mean)
        np.testing.assert_allclose(refit.mean.numpy()[free], exact[free], atol=1e-9)
        np.testing.assert_allclose(refit.covariance, prior - gain @ h @ prior, atol=1e-9)
        np.testing.assert_allclose(refit.prior_mean.numpy()[free], mean[free], atol=1e-9)
        np.testing.assert_allclose(refit.prior_covariance, prior, atol=1e-9)
        assert refit.names == tuple(study.names)


def test_a_singular_prior():
    """Three parameters that vary in two directions: as if these were the parameters."""
    rng = np.random.default_rng(4)
    mixture = np.linalg.qr(rng.normal(size=(3, 2)))[0]
    inner = simulate(5, size=2, prior=np.diag([0.5, 1.0]), prior_mean=0.0)
    posteriors = [
        bmr.Posterior(
            mixture @ one.mean.numpy() + 0.2,
            covariance=mixture @ one.covariance.numpy() @ mixture.T,
            prior_mean=0.2,
            prior_covariance=mixture @ one.prior_covariance.numpy() @ mixture.T,
            names=["a", "b", "c"],
            free_energy=one.free_energy,
        )
        for one in inner.posteriors()
    ]
    design = inner.design.copy()
    result = bmr.group_level(posteriors, design, log_precisions=0.4)
    # Offsets outside of the plane stay; those inside are parameters of the mean.
    shift = mixture.T @ np.full(3, 0.2)
    moved = [
        bmr.Posterior(
            one.mean + torch.tensor(shift),
            covariance=one.covariance,
            prior_mean=shift,
            prior_covariance=one.prior_covariance,
            names=["A", "B"],
            free_energy=one.free_energy,
        )
        for one in inner.posteriors()
    ]
    plain = bmr.group_level(moved, design, log_precisions=0.4)
    assert result.free_energy == pytest.approx(plain.free_energy, abs=1e-8)
    whole = np.kron(np.eye(2), mixture)
    outside = np.kron([1.0, 0.0], np.full(3, 0.2) - mixture @ shift)
    np.testing.assert_allclose(
        result.posterior.mean, whole @ plain.posterior.mean.numpy() + outside, atol=1e-8
    )
    np.testing.assert_allclose(
        result.posterior.covariance,
        whole @ plain.posterior.covariance.numpy() @ whole.T,
        atol=1e-8,
    )
    for one, other in zip(result.first_levels.values(), plain.first_levels.values(), strict=True):
        assert one.free_energy == pytest.approx(other.free_energy, abs=1e-8)
        rest = np.full(3, 0.2) - mixture @ shift
        np.testing.assert_allclose(one.mean, mixture @ other.mean.numpy() + rest, atol=1e-8)


def test_numbers_far_from_zero():
    """Posteriors a million standard deviations from the origin lose no digits that matter."""
    study = simulate(6, prior_mean=0.0)
    near = fit(study, log_precisions=0.0)
    far = [
        bmr.Posterior(
            one.mean + 1e6,
            covariance=one.covariance,
            prior_mean=1e6,
            prior_covariance=one.prior_covariance,
            names=study.names,
            free_energy=one.free_energy,
        )
        for one in study.posteriors()
    ]
    moved = bmr.group_level(far, study.design, log_precisions=0.0)
    assert moved.free_energy == pytest.approx(near.free_energy, abs=1e-6)
    np.testing.assert_allclose(moved.posterior.mean[:4] - 1e6, near.posterior.mean[:4], atol=1e-6)


@pytest.mark.rare
def test_intervals_cover():
    """Over 200 studies drawn from the priors, 90 % intervals cover 85 to 95 % of the effects."""
    hits = []
    for seed in range(200):
        gamma = np.random.default_rng(10_000 + seed).normal(0.0, 0.25)
        study = simulate(seed, size=2, rows=4, log_precisions=gamma)
        frame = bmr.group_level(study.posteriors(with_f=False), study.design).summary()
        hits.append(np.abs(frame["mean"] - study.effects) <= 1.6449 * frame["sd"])
    for covariate in np.mean(hits, axis=0).reshape(2, 2).mean(1):
        assert 0.85 <= covariate <= 0.95


def test_priors_of_your_own():
    study = simulate(7, size=3)
    root = np.random.default_rng(0).normal(size=(3, 5))
    between, effects = root @ root.T / 20, root @ root.T / 5 + np.eye(3)
    prior = bmr.GroupPrior(mean=[1.0, 2.0, 3.0], covariance=effects, between=between)
    result = fit(study, prior=prior, log_precisions=0.3)
    squares = (study.design**2).mean(0)
    spread = np.kron(np.diag(1 / squares), effects)
    study.between = lambda gamma, parts: between / (np.exp(0.3) + 1 / 4096)
    evidence, mean, covariance = study.solve(None, None, np.r_[1, 2, 3, 0, 0, 0], spread)
    assert result.free_energy == pytest.approx(-evidence, abs=1e-6)
    np.testing.assert_allclose(result.posterior.mean, mean, atol=1e-8)
    np.testing.assert_allclose(result.posterior.covariance, covariance, atol=1e-8)
    by_name = bmr.GroupPrior(
        mean=pd.Series([3.0, 1.0, 2.0], [study.names[i] for i in (2, 0, 1)]),
        covariance=effects,
        between=between,
    )
    assert fit(study, prior=by_name, log_precisions=0.3).free_energy == result.free_energy
    scaled = fit(study, prior=bmr.GroupPrior(alpha=2.0, beta=4.0), log_precisions=0.0)
    np.testing.assert_allclose(scaled.posterior.prior_covariance[:3, :3], study.prior / 2)
    np.testing.assert_allclose(
        scaled.between_covariance, study.prior / 4 / (1 + 1 / 4096), rtol=1e-9
    )
