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
