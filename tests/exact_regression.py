"""Linear regression with known noise, whose exact posterior goes into a guide."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import (
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)


class ExactRegression:
    """Inputs x, outputs y, noise, and the prior N(loc, scale²) of each weight; all in float64."""

    def __init__(self, x, y, noise, loc, scale):
        self.x, self.y, self.noise, self.loc, self.scale = x, y, noise, loc, scale

    def model(self):
        raise NotImplementedError

    def posterior(self):
        precision = self.x.mT @ self.x / self.noise**2 + self.scale.pow(-2).diag()
        linear = self.x.mT @ self.y / self.noise**2 + self.loc / self.scale.square()
        covariance = precision.inverse()
        return covariance @ linear, covariance

    def dense(self):
        loc, covariance = self.posterior()
        tril = torch.linalg.cholesky(covariance)
        guide = AutoMultivariateNormal(self.model)
        guide()
        guide.loc.data.copy_(loc)
        guide.scale = tril.diagonal()
        guide.scale_tril = tril / tril.diagonal()[:, None]
        return guide

    def low_rank(self):
        loc, covariance = self.posterior()
        size = len(loc)
        diagonal = 0.5 * torch.linalg.eigvalsh(covariance).min()
        factor = torch.linalg.cholesky(covariance - diagonal * torch.eye(size))
        guide = AutoLowRankMultivariateNormal(self.model, rank=size)
        guide()
        guide.loc.data.copy_(loc)
        guide.scale = diagonal.sqrt().expand(size).clone()
        guide.cov_factor.data.copy_(factor / diagonal.sqrt())
        return guide


class ObservedRegression(ExactRegression):
    """Some weights are zero; the model takes its data as arguments."""

    def __init__(self, rows=40, columns=6, noise=0.5, collinear=False):
        x = torch.randn(rows, columns, dtype=torch.float64)
        if collinear:
            x[:, 1] = x[:, 0] + 1e-2 * torch.randn(rows, dtype=torch.float64)
            x[:, 4] = x[:, 2] - x[:, 3]
        weights = torch.zeros(columns, dtype=torch.float64)
        weights[:3] = torch.tensor([1.0, -0.7, 0.5])
        y = x @ weights + noise * torch.randn(rows, dtype=torch.float64)
        zero = torch.zeros(columns, dtype=torch.float64)
        super().__init__(x, y, noise, zero, torch.ones_like(zero))

    @property
    def data(self):
        return self.x, self.y

    def model(self, x=None, y=None):
        x, y = self.data if x is None else (x, y)
        w = pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, self.noise), obs=y)

    def diagonal(self):
        """The best of the independent posteriors."""
        loc, covariance = self.posterior()
        guide = AutoNormal(self.model)
        guide()
        guide.locs.w, guide.scales.w = loc, covariance.inverse().diagonal().rsqrt()
        return guide
