r"""The prior scale with the highest evidence, for groups of elements at once.

With :math:`\alpha` the precision and :math:`h` the linear term of the likelihood of an element
around its prior mean, the evidence of the prior variance :math:`t` is, up to a constant,

.. math:: E(t) = \tfrac12 \sum_k \frac{h_k^2 \, t}{1 + t \alpha_k} - \ln(1 + t \alpha_k),

which is 0 for a spike. For correlated elements :math:`k` counts the eigenvectors of the precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tuned:
    """The best prior variance of every group; NaN where no element of it tells.

    ``spiked``: the evidence rises down to the lower end of the search, so that the spike wins;
    ``capped``: it rises up to the upper end.
    """

    variance: Tensor
    spiked: Tensor
    capped: Tensor

    def with_group(self, group: Tensor, other: Tuned) -> Tuned:
        """Take one group from ``other``."""
        here = torch.arange(len(self.variance), device="cpu") == group
        return Tuned(
            torch.where(here, other.variance, self.variance),
            torch.where(here, other.spiked, self.spiked),
            torch.where(here, other.capped, self.capped),
        )


# Below this part of the smallest likelihood variance E is a straight line from the spike on.
_FLOOR = 1e-4
# E changes over about one unit of ln t, and a search is hardly longer than fifty.
_POINTS = 256
_BISECTIONS = 48
_CHUNK = 1 << 22


def find_best_variance(curvature: Tensor, slope: Tensor, group: Tensor, highest: Tensor) -> Tuned:
    r"""Maximise the evidence over one prior variance per group, up to its ``highest``.

    The global maximum lies between the best variances of the single elements,
    :math:`t_k = (h_k^2 - \alpha_k) / \alpha_k^2` with curvature :math:`\alpha_k` and slope
    :math:`h_k`, in float64. It is bracketed on a grid in :math:`\ln t`, and refined by bisection of
    the derivative. Elements with :math:`\alpha_k \le 0` tell nothing, but end the search at half
    the variance from which on the posterior would be improper.
    """
    tells = curvature > 0
    silent = curvature[~tells]
    improper = torch.where(silent < 0, -0.5 / silent, torch.inf)
    highest = highest.scatter_reduce(0, group[~tells], improper, "amin")
    curvature, slope, group = curvature[tells], slope[tells], group[tells]
    count = len(highest)
    square = slope.square()
    largest = highest.new_zeros(count).scatter_reduce(0, group, curvature, "amax")
    single = (square - curvature) / curvature.square()
    top = highest.new_zeros(count).scatter_reduce(0, group, single, "amax")
    # Where the likelihood says next to nothing, the lower end is one below any prior.
    low = torch.minimum(_FLOOR / largest, _FLOOR**2 * highest)
    # A little more, so that the best variance of a single element is inside.
    high = torch.maximum(torch.minimum(1.01 * top, highest), low)

    def evidence(log_t: Tensor) -> Tensor:
        scaled = log_t.exp()[..., group] * curvature
        terms = 0.5 * (square / curvature * scaled / (1 + scaled) - scaled.log1p())
        return log_t.new_zeros(log_t.shape).index_add_(-1, group, terms)

    def rises(log_t: Tensor) -> Tensor:
        scaled = log_t.exp()[group] * curvature
        terms = scaled * (square / curvature / (1 + scaled).square() - 1 / (1 + scaled))
        return log_t.new_zeros(log_t.shape).index_add_(-1, group, terms) > 0

    best, left, right = _bracket(evidence, low.log(), high.log(), len(curvature))
    spiked = (best == 0) & ~rises(low.log())
    capped = rises(high.log()) & (best == _POINTS - 1)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (left + right)
        up = rises(middle)
        left, right = torch.where(up, middle, left), torch.where(up, right, middle)
    variance = torch.where(spiked, low, torch.where(capped, high, (0.5 * (left + right)).exp()))
    known = largest > 0
    return Tuned(torch.where(known, variance, torch.nan), known & spiked, known & capped)


def _bracket(
    evidence: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best point of a grid in each group, and its neighbours."""
    steps = torch.linspace(0, 1, _POINTS, dtype=low.dtype, device=low.device)
    grid = low + steps[:, None] * (high - low)
    values = torch.cat([evidence(part) for part in grid.split(max(1, _CHUNK // max(1, size)))])
    best = values.argmax(0, keepdim=True)
    left, right = ((best + step).clamp(0, _POINTS - 1) for step in (-1, 1))
    return best[0], grid.gather(0, left)[0], grid.gather(0, right)[0]
