"""Correlated posteriors under a singular prior, where some elements may determine others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Diagonal

# Of the variance of its elements, what a combination of them may have and count as determined.
_DETERMINED = 1e-9
# How far from zero, in standard deviations, rounding may leave what is determined to be there.
_AT_ZERO = 1e-6
# Numbers in the matrices of a batch.
_BATCH = 1 << 22


@dataclass(frozen=True)
class SingularContrast:
    r"""A posterior and a prior that vary on the same subspace only; as `Contrast`.

    .. math:: h(S) = \ln p(V^\top \theta_S = 0) - \ln q(V^\top \theta_S = 0)

    with a basis :math:`V` of what varies of :math:`\theta_S`. Of what is left, elements that are
    determined by :math:`\theta_S = 0` are zero, too, and a set that cannot be zero has ``inf``.
    """

    loc: Tensor
    covariance: Tensor
    prior_loc: Tensor
    prior_covariance: Tensor

    @property
    def size(self) -> int:
        """How many elements there are."""
        return len(self.loc)

    def marginals(self) -> Diagonal:
        """Return the posterior of every element by itself."""
        return Diagonal(self.loc, self.covariance.diagonal().clamp_min(0).sqrt())

    def of_sets(self, drop: Tensor) -> Tensor:
        """Return h of each of a batch of sets, boolean of shape ``(sets, n)``."""
        step = max(1, _BATCH // max(1, self.size**2))
        return torch.cat([self._of_sets(some) for some in drop.split(step)])

    def alone(self) -> Tensor:
        """Return h of each element by itself, of shape ``(n,)``."""
        return self.of_sets(torch.eye(self.size, dtype=torch.bool, device=self.loc.device))

    def chain(self) -> Tensor:
        """Return what each element adds to h, in their order, given that those before are zero."""
        sets = torch.ones(self.size, self.size, dtype=torch.bool, device=self.loc.device).tril()
        totals = self.of_sets(sets)
        return torch.where(totals.isinf(), torch.inf, totals.diff(prepend=totals.new_zeros(1)))

    def split(self, drop: Tensor) -> tuple[SingularContrast, SingularContrast]:
        """Return what dropping a set follows from, and what is left once it has gone."""
        scale = self.prior_covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)[drop]
        inner = self.prior_covariance[drop][:, drop] / scale[:, None] / scale
        size, basis = torch.linalg.eigh(inner)
        basis = basis[:, size > _DETERMINED] / scale[:, None]
        gone, left = [], []
        for loc, covariance in self._pair():
            inner = basis.mT @ covariance[drop][:, drop] @ basis
            columns = torch.cat([covariance[drop][:, ~drop], loc[drop, None]], -1)
            gain = torch.linalg.solve(inner, basis.mT @ columns)
            change = covariance[~drop][:, drop] @ basis @ gain
            rest = covariance[~drop][:, ~drop] - change[:, :-1]
            rest = _without_rounding((rest + rest.mT) / 2, covariance.diagonal()[~drop])
            gone += [loc[drop], covariance[drop][:, drop]]
            left += [loc[~drop] - change[:, -1], rest]
        return SingularContrast(*gone), SingularContrast(*left)

    def _of_sets(self, drop: Tensor) -> Tensor:
        scale = self.prior_covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        both, kept = drop[:, :, None] & drop[:, None, :], (~drop).to(self.loc).diag_embed()
        size, basis = torch.linalg.eigh(
            self.prior_covariance / scale[:, None] / scale * both + kept
        )
        varies = size > _DETERMINED
        outside = (~varies).to(self.loc).diag_embed()
        h = self.loc.new_zeros(len(drop))
        for sign, (loc, covariance) in zip((1.0, -1.0), self._pair(), strict=True):
            inner = basis.mT @ (covariance / scale[:, None] / scale * both + kept) @ basis
            inner = inner * varies[:, :, None] * varies[:, None, :] + outside
            edge = (basis.mT @ (loc / scale * drop)[:, :, None])[..., 0]
            tril, failed = torch.linalg.cholesky_ex(inner)
            whitened = torch.linalg.solve_triangular(
                tril, (edge * varies)[..., None], upper=False
            )[..., 0]
            log_root = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            h = h + sign * (log_root + 0.5 * whitened.square().sum(-1))
            off = ((edge * ~varies).abs() > _AT_ZERO).any(-1)
            h = torch.where(off | (failed != 0), torch.inf, h)
        return h

    def _pair(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.loc, self.covariance), (self.prior_loc, self.prior_covariance)


def _without_rounding(covariance: Tensor, variance: Tensor) -> Tensor:
    """Set rows and columns to zero of elements that are determined."""
    varies = covariance.diagonal() > _DETERMINED * variance
    return covariance * varies[:, None] * varies
