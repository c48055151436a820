"""Greedy search of the set of correlated elements to drop, from three starts and in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.evidence import delta_f_spike, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, LowRank
from pyro_bmr.mathematics.tableau import make_tableau, sweep_tableau

# Of so many elements all pairs are looked at.
MOST_IN_PAIRS = 512


def search_greedily(posterior: Dense | LowRank, log_prior: Tensor) -> Tensor:
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
        dense = posterior if isinstance(posterior, Dense) else posterior.dense()
        alone = delta_f_spike(dense.marginals(), log_prior) <= 0
        starts = (backward, torch.ones_like(backward), alone)
        ends = [*starts, *(_exchange(dense, log_prior, start) for start in starts)]
        return _best(dense, log_prior, ends)
    if isinstance(posterior, LowRank):
        return backward
    return _best(posterior, log_prior, [backward, _refine(posterior, log_prior, backward)])


def _best(posterior: Dense, log_prior: Tensor, ends: list[Tensor]) -> Tensor:
    def delta_f(dropped: Tensor) -> float:
        chain = delta_f_spike_chain(posterior.split(dropped)[0], log_prior[dropped])
        return float(chain.sum())

    return min(ends, key=delta_f)


def _refine(posterior: Dense, log_prior: Tensor, dropped: Tensor) -> Tensor:
    undecided = torch.zeros_like(dropped)
    cheapest = _change_of_mind(posterior, log_prior, dropped).topk(MOST_IN_PAIRS, largest=False)
    undecided[cheapest.indices] = True
    fixed = dropped & ~undecided
    _, rest = posterior.split(fixed)
    few, _ = rest.split(undecided[~fixed])
    dropped = dropped.clone()
    dropped[undecided] = _exchange(few, log_prior[undecided], dropped[undecided])
    return dropped


def _change_of_mind(posterior: Dense, log_prior: Tensor, dropped: Tensor) -> Tensor:
    """Change of F when one element is dropped, or taken back, and all others stay as they are."""
    shift = log_prior + 0.5 * LOG_2PI
    gone, rest = posterior.split(dropped)
    natural, marginal = gone.natural(), rest.marginals()
    precision = natural.precision.diagonal()
    change = torch.empty_like(shift)
    change[dropped] = 0.5 * (precision.log() - natural.linear.square() / precision)
    change[~dropped] = marginal.scale.log() + 0.5 * (marginal.loc / marginal.scale).square()
    return change + torch.where(dropped, -shift, shift)


# An exchange that gains less, in nats, is taken for rounding.
_ROUNDING = 1e-9
# After so many exchanges the tableau is made anew.
_EXCHANGES_A_TABLEAU = 50


def _exchange(posterior: Dense, log_prior: Tensor, dropped: Tensor) -> Tensor:
    dropped = dropped.clone()
    shift = log_prior + 0.5 * LOG_2PI
    # Where rounding beats the gains, exchanges could go round in circles.
    for step in range(10 * len(dropped)):
        if step % _EXCHANGES_A_TABLEAU == 0:
            tableau = make_tableau(posterior, dropped)
        change = _score_exchanges(tableau, shift, dropped)
        best = int(change.argmin())
        if change.view(-1)[best] > -_ROUNDING:
            break
        for i in {best // len(dropped), best % len(dropped)}:
            sweep_tableau(tableau[None], torch.tensor([i], device=dropped.device))
            dropped[i] ^= True
    return dropped


def _score_exchanges(tableau: Tensor, shift: Tensor, dropped: Tensor) -> Tensor:
    """Change of F by exchanging two elements, or on the diagonal by changing one."""
    # With a pivot d and t at the edge, one element changes F by ±shift + (ln |d| + t² / d) / 2, and
    # two do so with their 2 × 2 block in the place of d.
    pivot, last = tableau.diagonal()[:-1], tableau[:-1, -1]
    signed = torch.where(dropped, -shift, shift)
    covariance = tableau[:-1, :-1]
    product = torch.outer(pivot, pivot)
    determinant = product - covariance.square()
    quadratic = torch.outer(last.square(), pivot) - covariance * torch.outer(last, last)
    quadratic = (quadratic + quadratic.mT) / determinant
    pairs = signed[:, None] + signed + 0.5 * (determinant.abs().log() + quadratic)
    alone = signed + 0.5 * (pivot.abs().log() + last.square() / pivot)
    # Rounding may have cost a nearly singular element, or pair, its sign.
    sound = (pivot < 0) == dropped
    change = torch.where(determinant * product > 0, pairs, torch.inf).diagonal_scatter(alone)
    return torch.where(sound[:, None] & sound & change.isfinite(), change, torch.inf)
