"""Variable selection: inclusion probabilities by enumeration, evidences by importance sampling."""

import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from generalised import diabetes, logistic, poisson, standardised

import pyro_bmr as bmr
from pyro_bmr import datasets

SHARED = Path(os.environ.get("PYRO_BMR_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def boston():
    if not (SHARED / "uci").is_dir():
        pytest.skip("no UCI data; set PYRO_BMR_DATA to their directory")
    data = datasets.load("boston", SHARED)
    return standardised(data.x.double().numpy(), data.y.double().numpy()[:, 0])


PRIORS = {
    "g-prior": lambda x, variance: x.T @ x / (len(x) * variance),
    "independent": lambda x, variance: np.eye(x.shape[1]) / 0.5**2,
}


def enumerate_inclusion(x, y, precision, variance):
    """Inclusion probabilities from the log evidence of each of the 2ⁿ regressions."""
    size = x.shape[1]
    total, cross = x.T @ x / variance, x.T @ y / variance
    evidence = np.zeros(2**size)
    sets = (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)
    for i, kept in enumerate(sets):
        prior = precision[np.ix_(kept, kept)]
        posterior = prior + total[np.ix_(kept, kept)]
        fit = cross[kept] @ np.linalg.solve(posterior, cross[kept]) if kept.any() else 0.0
        evidence[i] = 0.5 * (np.linalg.slogdet(prior)[1] - np.linalg.slogdet(posterior)[1] + fit)
    return scipy.special.softmax(evidence) @ sets


@pytest.mark.parametrize("data", [diabetes, boston])
@pytest.mark.parametrize("prior", PRIORS)
def test_inclusion_probabilities_equal_enumeration(data, prior):
    x, y = data()
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    variance = residual @ residual / (len(y) - x.shape[1])
    precision = PRIORS[prior](x, variance)
    covariance = np.linalg.inv(precision + x.T @ x / variance)
    mean = covariance @ x.T @ y / variance
    expected = torch.tensor(enumerate_inclusion(x, y, precision, variance))

    def model(precision):
        zero = torch.zeros(len(precision))
        pyro.sample("w", dist.MultivariateNormal(zero, precision_matrix=precision))

    def guide(precision):
        spread = torch.tensor((covariance + covariance.T) / 2)
        pyro.sample("w", dist.MultivariateNormal(torch.tensor(mean), spread))

    found = bmr.presence(guide, torch.tensor(precision), model=model).probability["w"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    moments = bmr.Posterior({"w": mean}, covariance, prior_precision=precision)
    found = bmr.presence(moments).probability["w"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.rare
@pytest.mark.parametrize("problem", [logistic, poisson])
def test_the_chosen_set_against_importance_sampling(problem):
    glm = problem()
    mean, covariance = glm.posterior()
    posterior = bmr.Posterior({"w": mean}, covariance, prior_scale=1.0)
    result = bmr.reduce(posterior)
    kept = result.masks["w"].numpy()
    assert 0 < kept.sum() < len(kept)
    full, error = glm.log_evidence(np.ones_like(kept), mean, covariance)
    reduced, its_error = glm.log_evidence(kept, mean, covariance)
    assert max(error, its_error) < 0.05
    assert result.delta_f == pytest.approx(full - reduced, abs=0.3)
