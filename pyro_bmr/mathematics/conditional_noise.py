r"""The standard normals of a draw, and those of the same draw given that some elements are zero.

Matheron's rule (Wilson et al. 2021, "Pathwise conditioning of Gaussian processes",
arXiv:2011.04026, eq. 10): if :math:`\theta` is drawn from a Gaussian, :math:`\theta_R -
\Sigma_{RS} \Sigma_{SS}^{-1} \theta_S` is a draw of the rest given that :math:`\theta_S = 0`, and
as close to :math:`\theta_R` as such a draw can be. In terms of the noise that both are made from it
is a rotation, of which some coordinates are left out; so it can be applied to the noise of any
other Gaussian of the same elements, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense, LowRank


def condition_noise(posterior: Dense | LowRank, drop: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the map from noise of ``posterior`` to that of ``posterior.split(drop)[1]``."""
    if not drop.any():
        return lambda noise: noise
    return _CONDITION[type(posterior)](posterior, drop)


def _condition_dense(posterior: Dense, drop: Tensor) -> Callable[[Tensor], Tensor]:
    # With S in front and the Cholesky factor [[A, 0], [B, C]], C belongs to the conditional, and
    # what multiplies it in a draw of the joint is the noise of the conditional.
    order = torch.cat([drop.nonzero()[:, 0], (~drop).nonzero()[:, 0]])
    rows, tril = posterior.scale_tril[order], posterior.ordered(order)
    gone = int(drop.sum())

    def condition(noise: Tensor) -> Tensor:
        deviation = (rows @ noise.to(rows))[:, None]
        return torch.linalg.solve_triangular(tril, deviation, upper=False)[gone:, 0]

    return condition


def _condition_low_rank(posterior: LowRank, drop: Tensor) -> Callable[[Tensor], Tensor]:
    # Given zeros the latent normals have the precision T Tᵀ = I + Wᵀ D⁻¹ W, with the rows of S
    # only. Matheron's draw of them deviates from its mean by V (z − Wᵀ D^-½ e), V = T⁻ᵀ T⁻¹, and
    # `LowRank.at_zero` draws T⁻ᵀ u.
    gone = posterior.select(drop)
    whitened = gone.cov_factor / gone.cov_diag.sqrt()[:, None]
    rank = whitened.shape[-1]
    identity = torch.eye(rank, dtype=whitened.dtype, device=whitened.device)
    tril = torch.linalg.cholesky(identity + whitened.mT @ whitened)

    def condition(noise: Tensor) -> Tensor:
        latent, own = noise.to(whitened).split([rank, len(drop)])
        deviation = (latent - whitened.mT @ own[drop])[:, None]
        latent = torch.linalg.solve_triangular(tril, deviation, upper=False)[:, 0]
        return torch.cat([latent, own[~drop]])

    return condition


_CONDITION: dict[type, Callable[..., Callable[[Tensor], Tensor]]] = {
    Dense: _condition_dense,
    LowRank: _condition_low_rank,
}
