"""Greedy search of the set of correlated elements to drop, from three starts and in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.couplings import start_walk
from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.evidence import Correlated, delta_f_of_set, delta_f_spikes
from pyro_bmr.mathematics.gaussian import LOG_2PI, LowRank

# Of so many elements all pairs are looked at.
MOST_IN_PAIRS = 512


def search_greedily(posterior: Correlated, log_prior: Tensor) -> Tensor:
    r"""Drop one element at a time, then exchange, until no step lowers the free energy.

    Three starts: backward elimination, everything gone, and all gone that is worth it by itself.
    From each the best change of mind about one element or about two is made as long as that lowers
    :math:`\Delta F`; the best of the three ends counts, True for what goes. Where there are more
    than 512 elements, the search starts with the elimination only, and minds change about the 512
    whose own change would cost least; a `LowRank` posterior of so many is eliminated and no more.
    Exchanges are sweeps: Goodnight (1979), The American Statistician 33(3).
    """
    backward = eliminate(posterior, log_prior, 0.0).isfinite()
    if len(log_prior) <= MOST_IN_PAIRS:
        whole = posterior.dense() if isinstance(posterior, LowRank) else posterior
        alone = delta_f_spikes(whole, log_prior) <= 0
        starts = (backward, torch.ones_like(backward), alone)
        ends = [*starts, *(_exchange(whole, log_prior, start) for start in starts)]
        return _best(whole, log_prior, ends)
    if isinstance(posterior, LowRank):
        return backward
    return _best(posterior, log_prior, [backward, _refine(posterior, log_prior, backward)])


def _best(posterior: Correlated, log_prior: Tensor, ends: list[Tensor]) -> Tensor:
    return min(ends, key=lambda dropped: float(delta_f_of_set(posterior, log_prior, dropped)))


def _refine(posterior: Correlated, log_prior: Tensor, dropped: Tensor) -> Tensor:
    undecided = torch.zeros_like(dropped)
    change = start_walk(posterior, dropped).flips() + _signed(log_prior, dropped)
    undecided[change.topk(MOST_IN_PAIRS, largest=False).indices] = True
    fixed = dropped & ~undecided
    _, rest = posterior.split(fixed)
    few, _ = rest.split(undecided[~fixed])
    dropped = dropped.clone()
    dropped[undecided] = _exchange(few, log_prior[undecided], dropped[undecided])
    return dropped


# An exchange that gains less, in nats, is taken for rounding.
_ROUNDING = 1e-6


def _exchange(posterior: Correlated, log_prior: Tensor, dropped: Tensor) -> Tensor:
    walk = start_walk(posterior, dropped)
    # Where rounding beats the gains, exchanges could go round in circles.
    for _ in range(10 * len(dropped)):
        signed = _signed(log_prior, walk.dropped)
        alone = walk.flips() + signed
        if alone.min() <= -_ROUNDING:
            walk.flip(int(alone.argmin()))
            continue
        change = walk.pair_flips() + signed[:, None] + signed
        best = int(change.argmin())
        if change.view(-1)[best] > -_ROUNDING:
            break
        walk.flip(best // len(dropped))
        walk.flip(best % len(dropped))
    return walk.dropped


def _signed(log_prior: Tensor, dropped: Tensor) -> Tensor:
    """Return what flipping each element adds to ΔF beside its change of h."""
    shift = log_prior + 0.5 * LOG_2PI
    return torch.where(dropped, -shift, shift)
