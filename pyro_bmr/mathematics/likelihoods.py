r"""What a Gaussian posterior and its prior say about the likelihood, and the prior exchanged.

With :math:`u = z - \mu`, around the mean of the posterior, the likelihood over the evidence is

.. math:: \ln \frac{q(z)}{p(z)} = c - \tfrac12 u^\top L u + h^\top u, \quad
          L = \Sigma^{-1} - \Sigma_0^{-1}, \quad h = \Sigma_0^{-1} (\mu - \mu_0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likelihoods:
    """Of N units over k parameters each.

    ``at`` and ``linear`` ``(N, k)``, ``curvature`` ``(N, k, k)``, ``constant`` ``(N,)``. Where a
    unit says nothing about a parameter, its rows are zero.
    """

    at: Tensor
    curvature: Tensor
    linear: Tensor
    constant: Tensor

    def without(self, unit: int) -> Likelihoods:
        """Leave one unit out."""
        keep = torch.arange(len(self.at), device=self.at.device) != unit
        return Likelihoods(
            self.at[keep], self.curvature[keep], self.linear[keep], self.constant[keep]
        )

    def log_evidence(self, unit: int, mean: Tensor, covariance: Tensor) -> Tensor:
        r"""Give :math:`\ln \int (q/p)(z) N(z \mid m, V) dz` of one unit, for a batch of (m, V).

        With :math:`b = m - \mu` and :math:`M = I + V L`, it is
        :math:`c - \tfrac12 \ln|M| + h^\top M^{-1} b + \tfrac12 h^\top M^{-1} V h
        - \tfrac12 b^\top L M^{-1} b`; NaN where the integral diverges.
        """
        curvature, linear = self.curvature[unit], self.linear[unit]
        offset = mean - self.at[unit]
        matrix = covariance @ curvature
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        sign, log_det = torch.linalg.slogdet(matrix)
        pulled = covariance @ linear
        solved = torch.linalg.solve(matrix, torch.stack([offset, pulled], -1))
        moved, spread = solved.unbind(-1)
        value = moved @ linear + (spread @ linear) / 2
        value = value - ((offset @ curvature) * moved).sum(-1) / 2
        return torch.where(sign > 0, self.constant[unit] + value - log_det / 2, torch.nan)


def read_likelihood(
    mean: Tensor, covariance: Tensor, prior_mean: Tensor, prior_covariance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give L, h and c of one unit; an error of torch's where a covariance is singular."""
    tril, prior_tril = (torch.linalg.cholesky(one) for one in (covariance, prior_covariance))
    prior_precision = torch.cholesky_inverse(prior_tril)
    curvature = torch.cholesky_inverse(tril) - prior_precision
    moved = mean - prior_mean
    linear = prior_precision @ moved
    log_dets = prior_tril.diagonal().log().sum() - tril.diagonal().log().sum()
    return curvature, linear, log_dets + (moved @ linear) / 2


def exchange_marginal(
    mean: Tensor,
    covariance: Tensor,
    basis: Tensor,
    new_mean: Tensor,
    new_covariance: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Give a Gaussian another marginal of :math:`z = B^\top \theta`.

    The rest given :math:`z` is left. With :math:`C = B^\top \Sigma B` and
    :math:`K = \Sigma B C^{-1}`: the mean :math:`\mu + K (m' - B^\top \mu)` and the covariance
    :math:`\Sigma - K (C - C') K^\top`.
    Source: Jeffrey's rule; for Gaussians, the step back of the smoother of Rauch, Tung & Striebel
    (1965).
    """
    cross = covariance @ basis
    inner = basis.mT @ cross
    gain = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(inner)).mT
    moved = covariance - gain @ (inner - new_covariance) @ gain.mT
    return mean + gain @ (new_mean - basis.mT @ mean), (moved + moved.mT) / 2
