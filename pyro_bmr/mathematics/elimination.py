"""The order in which the elements of a correlated posterior should go.

Of two redundant weights each may be worth dropping while both together are a disaster, so the rest
is conditioned on each removal and scored again. An element that becomes cheap only after a dear one
went costs what the dear one cost: the result is the running maximum of ΔF along the path, raised
by rounding errors so that it tells which element went first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.mathematics.contrast import Contrast
from pyro_bmr.mathematics.couplings import start_walk
from pyro_bmr.mathematics.evidence import Correlated, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, LowRank
from pyro_bmr.mathematics.singular_contrast import SingularContrast


def eliminate(posterior: Correlated, log_prior: Tensor, stop: float) -> Tensor:
    """Remove one element at a time, the cheapest first, as long as none costs over ``stop`` nats.

    What stays has ``inf``, always so where ``log_prior`` is ``inf``.
    """
    return _ELIMINATE[type(posterior)](posterior, log_prior, stop)


def mark_path(like: Tensor, order: list[Tensor], costs: list[Tensor]) -> Tensor:
    """Give each element the dearest price up to it, above the one before; ``inf`` if it stays."""
    path = torch.full_like(like, torch.inf)
    if order:
        dearest = torch.cat([cost.reshape(-1) for cost in costs]).cummax(0).values
        ulp = torch.finfo(path.dtype).eps * dearest.abs().max().clamp_min(1.0)
        steps = torch.arange(len(dearest), dtype=path.dtype, device=path.device)
        path[torch.cat([index.reshape(-1) for index in order])] = dearest + ulp * steps
    return path


# So many steps are made at least before the host looks whether one was too dear; the further the
# walk is, the more, so that it waits a number of times that grows with the logarithm of the steps.
_UNSEEN = 16


def _eliminate_dense(posterior: Dense, log_prior: Tensor, stop: float) -> Tensor:
    # The rows of a Cholesky factor R whose pivots are chosen on the way: what is left of the
    # covariance is Σ − Rᵀ R, of which a step needs one row and the diagonal.
    covariance, loc = posterior.covariance, posterior.loc.clone()
    variance = covariance.diagonal().clone()
    shift = log_prior + 0.5 * LOG_2PI
    candidate = shift.isfinite()
    count = int(candidate.sum())
    root = covariance.new_empty(count, len(loc))
    order, costs = [], []
    seen = 0
    for step in range(count):
        variance.clamp_min_(torch.finfo(loc.dtype).tiny)
        scores = shift + 0.5 * (variance.log() + loc.square() / variance)
        # A vector of one index: the host does not need to know it.
        best = torch.where(candidate, scores, torch.inf).argmin(keepdim=True)
        order.append(best)
        costs.append(scores[best])
        if step + 1 >= seen + max(_UNSEEN, seen // 4) or step + 1 == count:
            dear = (torch.cat(costs[seen:]) > stop).tolist()
            if True in dear:
                end = seen + dear.index(True)
                return mark_path(posterior.loc, order[:end], costs[:end])
            seen = step + 1
        candidate[best] = False
        column = covariance[best][0] - root[:step, best][:, 0] @ root[:step]
        column /= variance[best].sqrt()
        loc -= column * (loc[best] / variance[best].sqrt())
        variance -= column.square()
        root[step] = column
    return mark_path(posterior.loc, order, costs)


def _eliminate_low_rank(posterior: LowRank, log_prior: Tensor, stop: float) -> Tensor:
    """Remove the cheaper half of the elements as a block, then score the rest again.

    A block is scored jointly, in its order, and ends before the first element that costs more,
    given all before it, than any of the block by itself.
    """
    shift = log_prior + 0.5 * LOG_2PI
    candidate = shift.isfinite()
    order, costs = [], []
    gone = torch.zeros_like(candidate)
    size = len(shift)
    while candidate.any():
        rest = posterior.at_zero(gone)
        variance = rest.marginals().scale.square()
        scores = shift + 0.5 * (variance.log() + rest.loc.square() / variance)
        scores = torch.where(candidate & (scores <= stop), scores, torch.inf)
        cheap = int(scores.isfinite().sum())
        if not cheap:
            break
        single, block = scores.topk(min(size, -(-cheap // 2)), largest=False)
        chain = delta_f_spike_chain(rest.select(block), log_prior[block])
        dear = (chain[1:] > single[-1]).nonzero()
        accepted = 1 + int(dear[0, 0]) if len(dear) else len(block)
        # Later blocks are no longer than this one could be.
        size = 2 * accepted
        block = block[:accepted]
        order.append(block)
        costs.append(chain[:accepted])
        gone[block] = True
        candidate[block] = False
    return mark_path(posterior.loc, order, costs)


def _eliminate_contrast(
    contrast: Contrast | SingularContrast, log_prior: Tensor, stop: float
) -> Tensor:
    shift = log_prior + 0.5 * LOG_2PI
    walk = start_walk(contrast, torch.zeros_like(shift, dtype=torch.bool))
    candidate = shift.isfinite()
    order, costs = [], []
    for _ in range(int(candidate.sum())):
        scores = torch.where(candidate & ~walk.dropped, shift + walk.flips(), torch.inf)
        best = scores.argmin()
        if scores[best] > stop or scores[best].isinf():
            break
        order.append(best)
        costs.append(scores[best])
        walk.flip(int(best))
    return mark_path(contrast.loc, order, costs)


_ELIMINATE: dict[type, Callable[..., Tensor]] = {
    Dense: _eliminate_dense,
    LowRank: _eliminate_low_rank,
    Contrast: _eliminate_contrast,
    SingularContrast: _eliminate_contrast,
}
