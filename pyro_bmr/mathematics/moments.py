"""Means and covariances, which may be singular."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense, triangular

# Of the variance of its elements, what a combination of them may have and count as determined.
DETERMINED = 1e-9


@dataclass(frozen=True)
class Moments:
    """A mean and a covariance of a Gaussian, in float64."""

    loc: Tensor
    covariance: Tensor

    def select(self, mask: Tensor) -> Moments:
        """Return the marginal of some elements."""
        return Moments(self.loc[mask], self.covariance[mask][:, mask])

    def given_zero(self, drop: Tensor) -> Moments:
        """Return the rest given that some elements are zero, as far as they vary."""
        if not drop.any():
            return self
        gone, basis = self.select(drop), find_subspace(self.covariance[drop][:, drop])
        across = self.covariance[~drop][:, drop] @ basis
        columns = torch.cat([across.mT, (basis.mT @ gone.loc)[:, None]], -1)
        gain = torch.linalg.solve(basis.mT @ gone.covariance @ basis, columns)
        covariance = self.covariance[~drop][:, ~drop] - across @ gain[:, :-1]
        covariance = (covariance + covariance.mT) / 2
        return Moments(self.loc[~drop] - across @ gain[:, -1], covariance)

    @property
    def singular(self) -> bool:
        """Whether some elements determine others."""
        return find_subspace(self.covariance).shape[-1] < len(self.loc)

    def dense(self) -> Dense:
        """Return the Gaussian, with a root that is singular if the covariance is."""
        tril, failed = torch.linalg.cholesky_ex(self.covariance)
        if failed:
            size, basis = torch.linalg.eigh(self.covariance)
            tril = triangular(basis * size.clamp_min(0).sqrt())
        return Dense(self.loc, tril)


def find_subspace(covariance: Tensor) -> Tensor:
    """Return an orthonormal basis, ``(n, r)``, of where a Gaussian varies."""
    scale = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    size, basis = torch.linalg.eigh(covariance / scale[:, None] / scale)
    varies = basis[:, size > DETERMINED]
    return torch.linalg.qr(scale[:, None] * varies).Q
