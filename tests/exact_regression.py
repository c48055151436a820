"""Linear regression with known noise, whose exact posterior goes into a guide."""

import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal


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
