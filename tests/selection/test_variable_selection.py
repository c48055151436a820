"""Variable selection: inclusion probabilities by enumeration, evidences by importance sampling."""

import os
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

import pyro_bmr as bmr
from pyro_bmr import datasets

SHARED = Path(os.environ.get("PYRO_BMR_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def standardised(x, y):
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def diabetes():
    return standardised(*load_diabetes(return_X_y=True))


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


class Glm:
    """A generalised linear model with ``w ~ N(0, 1)``, and its best Gaussian posterior.

    ``log_prob(f, y)``, and by quadrature its expected slope and curvature in the predictor f.
    """

    def __init__(self, x, y, log_prob, slope, curvature):
        self.x, self.y, self.log_prob, self.slope, self.curvature = x, y, log_prob, slope, curvature

    def posterior(self):
        """Mean and covariance of the Gaussian with the lowest free energy, by Newton's method."""
        points, weights = np.polynomial.hermite_e.hermegauss(41)
        weights = weights / weights.sum()
        size = self.x.shape[1]
        mean, covariance = np.zeros(size), 0.01 * np.eye(size)
        for _ in range(300):
            spread = np.sqrt(np.einsum("ij,jk,ik->i", self.x, covariance, self.x))
            f = (self.x @ mean)[:, None] + spread[:, None] * points
            slope, curvature = (
                function(f, self.y[:, None]) @ weights for function in (self.slope, self.curvature)
            )
            precision = np.eye(size) + self.x.T @ (self.x * curvature[:, None])
            covariance = np.linalg.inv(precision)
            mean = mean + 0.5 * covariance @ (self.x.T @ slope - mean)
        return mean, covariance

    def log_evidence(self, kept, mean, covariance):
        """By importance sampling from a t distribution, with its standard error."""
        x = self.x[:, kept]
        mean, _, covariance = self.restrict(kept, mean, covariance)
        proposal = scipy.stats.multivariate_t(mean, 1.2 * covariance, df=10, seed=0)
        draws = proposal.rvs(40_000).reshape(-1, len(mean))
        log_weight = self.log_prob(draws @ x.T, self.y).sum(-1) - proposal.logpdf(draws)
        log_weight += scipy.stats.norm.logpdf(draws).sum(-1)
        weight = np.exp(log_weight - log_weight.max())
        error = weight.std() / weight.mean() / len(weight) ** 0.5
        return log_weight.max() + np.log(weight.mean()), error

    def restrict(self, kept, mean, covariance):
        """The best Gaussian posterior of the smaller model, from scratch."""
        smaller = Glm(self.x[:, kept], self.y, self.log_prob, self.slope, self.curvature)
        mean, covariance = (mean, covariance) if kept.all() else smaller.posterior()
        return mean, kept, covariance


def logistic():
    x, y = load_breast_cancer(return_X_y=True)
    x = np.column_stack([standardised(x, y)[0], np.ones(len(x))])
    return Glm(
        x,
        2.0 * y - 1,
        lambda f, y: -np.logaddexp(0, -y * f),
        lambda f, y: y * scipy.special.expit(-y * f),
        lambda f, y: scipy.special.expit(f) * scipy.special.expit(-f),
    )


def poisson():
    x, _ = diabetes()
    rate = np.exp(0.3 + 0.4 * x[:, 2] - 0.3 * x[:, 4])
    y = np.random.default_rng(0).poisson(rate).astype(float)
    return Glm(
        np.column_stack([x, np.ones(len(x))]),
        y,
        lambda f, y: y * f - np.exp(f) - scipy.special.gammaln(y + 1),
        lambda f, y: y - np.exp(f),
        lambda f, y: np.exp(f),
    )


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
