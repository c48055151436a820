"""Posteriors without variance in some direction, fixed elements, and what is refused."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_bmr as bmr


def delta_f(mean, covariance, basis, drop):
    """ΔF of a set in coordinates of the subspace, in numpy, with the prior on it."""
    rows = basis[drop]
    left, size, _ = np.linalg.svd(rows, full_matrices=False)
    left = left[:, size > 1e-9]
    if np.abs(mean[drop] - left @ (left.T @ mean[drop])).max() > 1e-9:
        return np.inf
    projection = basis @ basis.T
    total = 0.0
    for sign, loc, spread in (
        (1, mean, covariance),
        (-1, projection @ (0 - mean) + mean, projection),
    ):
        inner = left.T @ spread[np.ix_(drop, drop)] @ left
        point = left.T @ loc[drop]
        total += sign * 0.5 * (np.linalg.slogdet(inner)[1] + point @ np.linalg.solve(inner, point))
    return total


def test_a_singular_posterior_under_an_independent_prior():
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(5, 3)))
    mean, covariance = basis @ [0.05, -0.05, 0.6], 0.05 * basis @ basis.T
    posterior = bmr.Posterior(mean, covariance, prior_scale=1.0)
    with pytest.warns(UserWarning, match="no variance in 2 directions"):
        result = bmr.reduce(posterior)
    sets = [np.flatnonzero(d) for d in itertools.product([False, True], repeat=5) if any(d)]
    exact = {tuple(s): delta_f(mean, covariance, basis, s) for s in sets}
    dropped = tuple(np.flatnonzero(~result.masks["theta"].numpy()))
    assert result.delta_f == pytest.approx(min(0.0, *exact.values()), abs=1e-7)
    assert result.delta_f == pytest.approx(exact.get(dropped, 0.0), abs=1e-7)


@pytest.mark.parametrize("mean", [[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
def test_equal_elements(mean):
    posterior = bmr.Posterior(mean, np.full((2, 2), 0.5), prior_scale=1.0)
    with pytest.warns(UserWarning, match="no variance in 1 directions"):
        result = bmr.reduce(posterior)
    assert np.isfinite(result.delta_f)
    with pytest.warns(UserWarning, match="no variance in 1 directions"):
        assert bmr.presence(posterior).probability["theta"].isfinite().all()


def test_what_contradicts_itself_is_refused():
    def model():
        pyro.sample("w", dist.Normal(0.0, 1.0))

    own = bmr.Posterior({"w": 0.3}, scale=0.1, prior_scale=1.0)
    with pytest.raises(ValueError, match="a prior of its own, and a Pyro model"):
        bmr.reduce(own, model=model)
    with pytest.raises(ValueError, match="tell all elements apart"):
        bmr.Posterior({"A": np.zeros(2), "A[0]": 1.0}, scale=1.0)
    prior = np.array([[1.0, 0.5], [0.5, 1.0]])
    fixed = bmr.Posterior([0.1, 0.2], np.diag([0.5, 0.0]), prior_covariance=prior)
    assert bmr.reduce(fixed).delta_f < 0
    with pytest.raises(ValueError, match="have no variance, but a prior that is correlated"):
        bmr.reduce(fixed, reduced_prior=bmr.Spike(rest="marginal"))
    with pytest.raises(ValueError, match="variances that are not negative, as that of element 1"):
        bmr.Posterior([0.0, 0.0], np.diag([1.0, -1.0]))
    many = bmr.Posterior(np.zeros(30_000), scale=1.0, prior_scale=1.0)
    with pytest.raises(ValueError, match="variance has any number"):
        _ = many.covariance
    assert bmr.reduce(many).sparsity == 1.0


def test_searches_stay_where_the_marginal_prior_leaves_a_posterior():
    improper = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        posterior, prior = (
            root @ root.T * size / 4 + 0.1 * np.eye(4)
            for size, root in ((0.5, random.normal(size=(4, 4))), (1.0, random.normal(size=(4, 4))))
        )
        mean = 0.3 * random.normal(size=4)
        moments = bmr.Posterior(mean, posterior, prior_covariance=prior)
        likelihood = np.linalg.inv(posterior) - np.linalg.inv(prior)
        for select in (None, bmr.exhaustive(), bmr.by_blocks(), bmr.top_k(1)):
            spike = bmr.Spike(rest="marginal")
            result = bmr.reduce(moments, select=select, reduced_prior=spike)
            kept = result.masks["theta"].numpy()
            inner = np.linalg.inv(prior[np.ix_(kept, kept)]) + likelihood[np.ix_(kept, kept)]
            assert np.isfinite(result.delta_f)
            assert not kept.any() or np.linalg.eigvalsh(inner)[0] > 0
        improper += bool(result.scores["theta"].isinf().any())
    assert improper > 0
    assert torch.isfinite(torch.tensor(result.delta_f))
