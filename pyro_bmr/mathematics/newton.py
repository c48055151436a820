"""The maximum of a smooth function of a few numbers, by Newton's method with a line search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Maximum:
    """Where a function is largest, and minus its Hessian there."""

    at: Tensor
    curvature: Tensor
    converged: bool


# A step is expected to gain so little when it is the last, in units of the function.
_TOLERANCE = 1e-10
_STEPS = 200
_HALVINGS = 40
# No number moves further at once.
_LONGEST = 4.0


def maximise(
    value: Callable[[Tensor], Tensor],
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
) -> Maximum:
    """Climb from ``start``; ``value`` is minus infinity or NaN where the function is undefined.

    Where the Hessian is not negative, its eigenvalues are taken as if they were (Nocedal & Wright
    2006, "Numerical optimization", sec. 3.4).
    """
    at, height = start, value(start)
    for _ in range(_STEPS):
        gradient, hessian = derivatives(at)
        values, vectors = torch.linalg.eigh(-hessian)
        steepness = values.abs().clamp_min(1e-8 * float(values.abs().max()))
        step = vectors @ ((vectors.mT @ gradient) / steepness)
        step = step * min(1.0, _LONGEST / max(float(step.abs().max()), 1e-300))
        slope = float(gradient @ step)
        last = slope < _TOLERANCE
        for halving in range(_HALVINGS):
            part = 0.5**halving
            higher = value(at + part * step)
            if higher >= height + 1e-4 * part * slope:
                at, height = at + part * step, higher
                break
            if last:
                break
        else:
            return Maximum(at, -hessian, converged=False)
        if last:
            return Maximum(at, -derivatives(at)[1], converged=True)
    return Maximum(at, -derivatives(at)[1], converged=False)
