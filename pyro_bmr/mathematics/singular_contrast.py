"""Correlated posteriors under a singular prior, where some elements may determine others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense, Diagonal
from pyro_bmr.mathematics.moments import Moments, find_subspace

# Of the spread of its elements, what a combination of them may have and count as determined.
_DETERMINED = 1e-6
# How far from zero, in standard deviations, rounding may leave what is determined to be there.
_AT_ZERO = 1e-6
# Numbers in the matrices of a batch.
_BATCH = 1 << 22


@dataclass(frozen=True)
class SingularContrast:
    r"""A posterior and a prior that vary on the same subspace only; as `Contrast`.

    .. math:: p = N(\mu_0, U U^\top), \quad q = N(\mu, U Q U^\top), \quad
              h(S) = \ln p(\theta_S = 0) - \ln q(\theta_S = 0)

    where the densities are of what varies of :math:`\theta_S`. Of what is left, elements that are
    determined by :math:`\theta_S = 0` are zero, too, and a set that cannot be zero has ``inf``.

    ``loc``, ``prior_loc``, of shape ``(n,)``; ``root`` :math:`U`, ``(n, r)``; ``inner``
    :math:`Q`, ``(r, r)``.
    """

    loc: Tensor
    prior_loc: Tensor
    root: Tensor
    inner: Tensor

    @property
    def size(self) -> int:
        """How many elements there are."""
        return len(self.loc)

    @property
    def covariance(self) -> Tensor:
        """The posterior covariance, of shape ``(n, n)``."""
        return self.root @ self.inner @ self.root.mT

    @property
    def noise_size(self) -> int:
        """How many standard normals a draw of the posterior needs."""
        return self.size

    def gaussian(self) -> Dense:
        """Return the posterior."""
        return Moments(self.loc, self.covariance).dense()

    def marginals(self) -> Diagonal:
        """Return the posterior of every element by itself."""
        return Diagonal(self.loc, self.covariance.diagonal().clamp_min(0).sqrt())

    def of_sets(self, drop: Tensor) -> Tensor:
        """Return h of each of a batch of sets, boolean of shape ``(sets, n)``."""
        step = max(1, _BATCH // max(1, self.size**2))
        return torch.cat([self._of_sets(some) for some in drop.split(step)])

    def of_set(self, drop: Tensor) -> Tensor:
        """Return h of a set, boolean of shape ``(n,)``."""
        return self.of_sets(drop[None])[0]

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
        gone, rest = self.root[drop], self.root[~drop]
        scale = _scale(gone)
        left, size, right = torch.linalg.svd(gone / scale[:, None])
        rank = int((size > _DETERMINED).sum())
        along, across = right[:rank].mT, right[rank:].mT
        back = (left[:, :rank] / size[:rank]).mT / scale
        gain = self.inner @ along @ torch.linalg.inv(along.mT @ self.inner @ along)
        kept = self.inner - gain @ along.mT @ self.inner
        conditional = across.mT @ kept @ across
        return (
            SingularContrast(self.loc[drop], self.prior_loc[drop], gone, self.inner),
            SingularContrast(
                self.loc[~drop] - rest @ gain @ (back @ self.loc[drop]),
                self.prior_loc[~drop] - rest @ along @ (back @ self.prior_loc[drop]),
                rest @ across,
                (conditional + conditional.mT) / 2,
            ),
        )

    def _of_sets(self, drop: Tensor) -> Tensor:
        scale = _scale(self.root)
        rows = self.root / scale[:, None] * drop[..., None]
        left, size, right = torch.linalg.svd(rows, full_matrices=False)
        varies = size > _DETERMINED
        both = varies[:, :, None] & varies[:, None, :]
        ones = (~varies).to(self.loc).diag_embed()
        inner = torch.where(both, right @ self.inner @ right.mT, 0) + ones
        edges = [left.mT @ (loc / scale * drop)[..., None] for loc in (self.loc, self.prior_loc)]
        own, prior = (
            torch.where(varies, edge[..., 0] / torch.where(varies, size, 1), 0) for edge in edges
        )
        tril, failed = torch.linalg.cholesky_ex(inner)
        whitened = torch.linalg.solve_triangular(tril, own[..., None], upper=False)[..., 0]
        h = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        h = h + 0.5 * (whitened.square().sum(-1) - prior.square().sum(-1))
        # What is left of the means where nothing varies has to be zero as it is.
        off = [
            (loc / scale * drop - (left @ torch.where(varies[..., None], edge, 0))[..., 0]).abs()
            for loc, edge in zip((self.loc, self.prior_loc), edges, strict=True)
        ]
        apart = (torch.maximum(*off) > _AT_ZERO).any(-1)
        return torch.where(apart | (failed != 0), torch.inf, h)


def contrast_singular(posterior: Moments, prior: Moments) -> SingularContrast:
    """Contrast two Gaussians that vary on the same subspace."""
    basis = find_subspace(prior.covariance)
    root = basis @ torch.linalg.cholesky(basis.mT @ prior.covariance @ basis)
    back = torch.linalg.pinv(root)
    inner = back @ posterior.covariance @ back.mT
    return SingularContrast(posterior.loc, prior.loc, root, (inner + inner.mT) / 2)


def _scale(root: Tensor) -> Tensor:
    scale = torch.linalg.vector_norm(root, dim=-1)
    return torch.where(scale > 0, scale, 1.0)
