"""`presence` and `average` of both meanings of what is left, against all models in numpy."""

import itertools

import numpy as np
import pytest

import pyro_bmr as bmr

SIZE = 4
NAMES = [f"A({i},1)" for i in range(SIZE)]


def gaussians():
    random = np.random.default_rng(0)
    root = random.normal(size=(SIZE, SIZE))
    prior = np.eye(SIZE) + 0.5 * root @ root.T
    information = np.diag(random.uniform(0.5, 3.0, SIZE)) + 0.4
    covariance = np.linalg.inv(np.linalg.inv(prior) + information)
    return prior, information, covariance, covariance @ information @ random.normal(size=SIZE)


def by_hand(rest):
    """Log evidence and moments of each subset, from its own prior and the likelihood."""
    prior, information, covariance, mean = gaussians()
    linear = np.linalg.solve(covariance, mean)
    for kept in itertools.product([False, True], repeat=SIZE):
        k = np.array(kept)
        block = np.linalg.inv(prior[np.ix_(k, k)])
        if rest == "conditional":
            block = np.linalg.inv(prior)[np.ix_(k, k)]
        after = np.linalg.inv(block + information[np.ix_(k, k)])
        own = after @ linear[k]
        evidence = 0.5 * (linear[k] @ own + np.linalg.slogdet(after)[1])
        evidence += 0.5 * np.linalg.slogdet(block)[1]
        whole, spread = np.zeros(SIZE), np.zeros((SIZE, SIZE))
        whole[k], spread[np.ix_(k, k)] = own, after
        yield k, evidence, whole, spread + np.outer(whole, whole)


@pytest.mark.parametrize("rest", ["conditional", "marginal"])
def test_every_subset_has_the_prior_that_is_meant(rest):
    prior, _, covariance, mean = gaussians()
    q = bmr.Posterior(mean, covariance, prior_covariance=prior, names=NAMES)
    kept, evidence, means, squares = map(np.array, zip(*by_hand(rest), strict=True))
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    spike = bmr.Spike(rest=rest)
    found = bmr.presence(q, reduced_prior=spike)
    flat = [float(found.probability[name]) for name in NAMES]
    np.testing.assert_allclose(flat, weight @ kept, atol=1e-10)
    average = bmr.average(q, reduced_prior=spike)
    flat = [float(average.mean[name]) for name in NAMES]
    np.testing.assert_allclose(flat, weight @ means, atol=1e-10)
    second = np.tensordot(weight, squares, 1) - np.outer(weight @ means, weight @ means)
    np.testing.assert_allclose(average.joint_covariance(NAMES), second, atol=1e-10)


@pytest.mark.parametrize("function", [bmr.presence, bmr.average])
def test_other_reduced_priors_are_refused(function):
    q = bmr.Posterior([0.1], scale=0.2, prior_scale=1.0, names=["a"])
    for wrong in (bmr.Gaussian(0.0, 0.1), bmr.Spike(loc=1.0), "marginal"):
        with pytest.raises(ValueError, match="reduced_prior"):
            function(q, reduced_prior=wrong)


def test_a_walk_finds_the_same(monkeypatch):
    monkeypatch.setattr("pyro_bmr.averaging.model_space.MOST_ELEMENTS", 2)
    prior, _, covariance, mean = gaussians()
    q = bmr.Posterior(mean, covariance, prior_covariance=prior, names=NAMES)
    kept, evidence, means, _ = map(np.array, zip(*by_hand("marginal"), strict=True))
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    found = bmr.average(q, reduced_prior=bmr.Spike(rest="marginal"), num_samples=250)
    assert found.mean_error
    for i, name in enumerate(NAMES):
        error = 5 * float(found.presence_error[name]) + 1e-6
        assert float(found.presence[name]) == pytest.approx(weight @ kept[:, i], abs=error)
        error = 5 * float(found.mean_error[name]) + 1e-6
        assert float(found.mean[name]) == pytest.approx(weight @ means[:, i], abs=error)
