"""Mixtures of normals and point masses: their tails and quantiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tail(loc: Tensor, scale: Tensor, above: float) -> Tensor:
    r"""Return :math:`P(x > c)` of each normal; of a point mass, whose scale is 0, 0 or 1."""
    distance = loc - above
    return torch.where(scale > 0, torch.special.ndtr(distance / scale), (distance > 0).to(distance))


def quantiles(weight: Tensor, loc: Tensor, scale: Tensor, level: float) -> Tensor:
    r"""Return the smallest :math:`x` with :math:`\sum_m w_m P_m(\theta \le x) \ge u`.

    ``weight``, ``(models,)``, adds up to 1; ``loc`` and ``scale`` are ``(models, n)``. Point
    masses, whose scale is 0, are at zero. By Newton's method, inside a bracket that begins at the
    least and the largest quantile of a component, which are on both sides of that of the mixture.
    """
    spread = scale > 0
    safe = torch.where(spread, scale, 1.0)
    share = torch.where(spread, weight[:, None], 0.0)
    atom = 1 - share.sum(0)

    def below(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - loc) / safe
        density = torch.exp(-0.5 * z.square()) / (safe * math.sqrt(2 * math.pi))
        return (share * torch.special.ndtr(z)).sum(0), (share * density).sum(0)

    at_zero, _ = below(torch.zeros_like(loc[0]))
    # Left of zero there are no point masses, and from it on all of them.
    right = at_zero < level
    is_zero = right & (at_zero + atom >= level)
    wanted = torch.where(right, level - atom, level)
    each = loc + scale * torch.special.ndtri(torch.tensor(level, dtype=loc.dtype, device="cpu"))
    low = torch.where(right, 0.0, each.amin(0))
    high = torch.where(right & ~is_zero, each.amax(0).clamp_min(0.0), 0.0)
    x = 0.5 * (low + high)
    for _ in range(_MOST_STEPS):
        value, slope = below(x)
        reached = value >= wanted
        low, high = torch.where(reached, low, x), torch.where(reached, x, high)
        newton = x - (value - wanted) / slope
        inside = (newton > low) & (newton < high)
        following = torch.where(inside, newton, 0.5 * (low + high))
        moved, x = (following - x).abs(), following
        if (moved <= _PRECISION * (1 + x.abs())).all():
            break
    return x


# Bisections alone would need so many steps to come down to rounding; Newton's method, about ten.
_MOST_STEPS, _PRECISION = 60, 1e-14
