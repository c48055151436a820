"""Generalised linear models with their best Gaussian posteriors and their evidence, in numpy."""

import numpy as np
import scipy.special
import scipy.stats
from sklearn.datasets import load_breast_cancer, load_diabetes


def standardised(x, y):
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def diabetes():
    return standardised(*load_diabetes(return_X_y=True))


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

    def laplace(self):
        """Mean and covariance of Laplace's approximation at the mode, by Newton's method."""
        mean = np.zeros(self.x.shape[1])
        for _ in range(100):
            f = self.x @ mean
            precision = np.eye(len(mean)) + self.x.T @ (self.x * self.curvature(f, self.y)[:, None])
            step = np.linalg.solve(precision, self.x.T @ self.slope(f, self.y) - mean)
            mean = mean + 0.5 * step
        return mean, np.linalg.inv(precision)

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
