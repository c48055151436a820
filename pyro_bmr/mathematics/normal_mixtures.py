"""Mixtures of normals and point masses: their tails and quantiles."""

from __future__ import annotations

import torch
from torch import Tensor


def tail(loc: Tensor, scale: Tensor, above: float) -> Tensor:
    r"""Return :math:`P(x > c)` of each normal; of a point mass, whose scale is 0, 0 or 1."""
    distance = loc - above
    return torch.where(scale > 0, torch.special.ndtr(distance / scale), (distance > 0).to(distance))


def quantiles(weight: Tensor, loc: Tensor, scale: Tensor, level: float) -> Tensor:
    r"""Return the smallest :math:`x` with :math:`\sum_m w_m P_m(\theta \le x) \ge u`, exactly.

    ``weight``, ``(models,)``, adds up to 1; ``loc`` and ``scale`` are ``(models, n)``. Point
    masses, whose scale is 0, are at zero. By bisection between the least and the largest quantile
    of a component, which are on both sides of that of the mixture.
    """
    spread = scale > 0
    safe = torch.where(spread, scale, 1.0)

    def below(x: Tensor, atoms: float) -> Tensor:
        normal = torch.special.ndtr((x - loc) / safe)
        return weight @ torch.where(spread, normal, atoms)

    zero = torch.zeros_like(loc[0])
    mass_below, mass_with = below(zero, 0.0), below(zero, 1.0)
    each = loc + scale * torch.special.ndtri(torch.tensor(level, dtype=loc.dtype)).to(loc.device)
    low, high = each.amin(0), each.amax(0)
    # Left of zero there are no point masses, and from it on all of them.
    negative = mass_below >= level
    low, high = torch.where(negative, low, 0.0), torch.where(negative, 0.0, high)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        normal = torch.special.ndtr((middle - loc) / safe)
        reached = weight @ torch.where(spread, normal, (~negative).to(normal)) >= level
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return torch.where(~negative & (mass_with >= level), 0.0, high)


# From a bracket of ten standard deviations on, so many halvings come down to rounding.
_HALVINGS = 56
