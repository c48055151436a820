"""What the gradient of F adds to the evidence, where a posterior is not at the optimum of F."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank

# The curvature at the mean says little of what is farther away, in standard deviations squared.
_REACH = 4.0


def first_order_independent(posterior: Diagonal, d_loc: Tensor, d_scale: Tensor) -> Tensor:
    r"""Return by element what the gradient of F adds to ΔF of a spike, in nats.

    :math:`-\mu \, \partial F / \partial \mu + \tfrac12 (\min(z^2, 4) - 1) \, \sigma \,
    \partial F / \partial \sigma` with :math:`z = \mu / \sigma`: E_q[ln p(y | θ)] to second order in
    mean and variance (Opper & Archambeau 2009, eq. 9) minus the same at a stationary point, where
    what is left is the Savage-Dickey ratio.
    """
    reach = (posterior.loc / posterior.scale).square().clamp(max=_REACH) - 1
    shift = 0.5 * reach * posterior.scale * d_scale - posterior.loc * d_loc
    return torch.where(posterior.scale > 0, shift, 0)


def first_order_correlated(posterior: Dense | LowRank, d_loc: Tensor) -> Tensor:
    r"""Return :math:`-\mu_i (\Sigma \, \partial F / \partial \mu)_i / \Sigma_{ii}` in nats.

    Conditioning on θ_i = 0 moves all means by :math:`-\Sigma_i \mu_i / \Sigma_{ii}`.
    """
    root = posterior.root()
    moved = root @ (root.mT @ d_loc.to(root))
    return -posterior.loc * moved / posterior.marginals().scale.square()


def settle(first: Tensor, second: Tensor, posterior: Diagonal) -> Tensor:
    r"""Average two independent estimates of a shift, less their noise, but not beyond zero.

    The noise of one element is that of its two estimates and of all elements, in units of
    :math:`|z|`, half and half, since two numbers alone say little of it.
    """
    mean, noise = (first + second) / 2, (first - second).abs() / 2
    z = torch.where(posterior.scale > 0, posterior.loc / posterior.scale, 0).abs()
    weight = z + 0.5 * (z.square().clamp(max=_REACH) - 1).abs()
    alive = (posterior.scale > 0) & (weight > 0)
    common = (noise / weight)[alive].square().mean() if alive.any() else 0.0
    noise = (0.5 * (noise.square() + weight.square() * common)).sqrt()
    return mean.sign() * (mean.abs() - noise).clamp(min=0)


def accuracy_of_log_normal(d_loc: Tensor, d_scale: Tensor, scale: Tensor) -> Tensor:
    r"""Return :math:`E_q[\ell] - \ell(0)` of a LogNormal element, from the slopes of the first.

    If :math:`\ell` is quadratic in :math:`\theta`, it is :math:`b M_1 - \tfrac12 c M_2` with
    :math:`M_k = E[\theta^k] = \exp(k \mu + k^2 \sigma^2 / 2)`; the slopes by :math:`\mu` and
    :math:`\sigma` give :math:`b` and :math:`c`.
    """
    return 1.5 * d_loc - 0.5 * d_scale / scale


def accuracy_of_gamma(d_log_mean: Tensor, d_log_alpha: Tensor, alpha: Tensor) -> Tensor:
    r"""Return the same of Gamma(α, β), from slopes by the logarithms of its mean and α.

    :math:`M_1 = \alpha / \beta` and :math:`M_2 = M_1^2 (1 + 1 / \alpha)`.
    """
    return d_log_mean + (alpha + 1) * d_log_alpha


def first_order_log_normal(posterior: Diagonal, d_loc: Tensor, d_scale: Tensor) -> Tensor:
    """Return by element what the gradient of F adds to ΔF of zero, in nats, as for Gaussians."""
    nearer = posterior.scale.clamp(min=_REACH**-0.5)
    scale = torch.where(posterior.scale > 0, nearer.square() / posterior.scale, 1)
    shift = -accuracy_of_log_normal(d_loc, d_scale, scale)
    return torch.where(posterior.scale > 0, shift, 0)


def first_order_gamma(alpha: Tensor, d_log_mean: Tensor, d_log_alpha: Tensor) -> Tensor:
    """Return the same of Gamma elements."""
    return -accuracy_of_gamma(d_log_mean, d_log_alpha, alpha.clamp(max=_REACH))
