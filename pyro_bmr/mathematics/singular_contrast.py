"""Correlated posteriors under a singular prior, where some elements may determine others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.moments import DETERMINED, Moments

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

    posterior: Moments
    prior: Moments

    @property
    def loc(self) -> Tensor:
        """The posterior mean, of shape ``(n,)``."""
        return self.posterior.loc

    @property
    def covariance(self) -> Tensor:
        """The posterior covariance, of shape ``(n, n)``."""
        return self.posterior.covariance

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
        pair = self.posterior, self.prior
        left = (_without_rounding(one.given_zero(drop), one.select(~drop)) for one in pair)
        return SingularContrast(*(one.select(drop) for one in pair)), SingularContrast(*left)

    def _of_sets(self, drop: Tensor) -> Tensor:
        scale = self.prior.covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        both, kept = drop[:, :, None] & drop[:, None, :], (~drop).to(self.loc).diag_embed()
        size, basis = torch.linalg.eigh(
            self.prior.covariance / scale[:, None] / scale * both + kept
        )
        varies = size > DETERMINED
        outside = (~varies).to(self.loc).diag_embed()
        h = self.loc.new_zeros(len(drop))
        for sign, one in ((1.0, self.posterior), (-1.0, self.prior)):
            inner = basis.mT @ (one.covariance / scale[:, None] / scale * both + kept) @ basis
            inner = inner * varies[:, :, None] * varies[:, None, :] + outside
            edge = (basis.mT @ (one.loc / scale * drop)[:, :, None])[..., 0]
            tril, failed = torch.linalg.cholesky_ex(inner)
            whitened = torch.linalg.solve_triangular(tril, (edge * varies)[..., None], upper=False)[
                ..., 0
            ]
            log_root = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            h = h + sign * (log_root + 0.5 * whitened.square().sum(-1))
            off = ((edge * ~varies).abs() > _AT_ZERO).any(-1)
            h = torch.where(off | (failed != 0), torch.inf, h)
        return h


def _without_rounding(rest: Moments, before: Moments) -> Moments:
    """Set to zero what no longer varies."""
    varies = rest.covariance.diagonal() > DETERMINED * before.covariance.diagonal()
    return Moments(rest.loc, rest.covariance * varies[:, None] * varies)
