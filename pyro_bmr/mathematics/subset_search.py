"""Which set of correlated elements to drop, where sets are scored as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.evidence import Correlated, delta_f_of_set, delta_f_spikes
from pyro_bmr.mathematics.greedy import search_greedily
from pyro_bmr.mathematics.subsets import MOST_ELEMENTS, delta_f_of_all_subsets, subset_members


def search_best(posterior: Correlated, log_prior: Tensor) -> Tensor:
    """Search all sets where there are few elements, which takes no longer, otherwise greedily."""
    few = len(log_prior) <= MOST_ELEMENTS
    return (search_all if few else search_greedily)(posterior, log_prior)


def search_all(posterior: Correlated, log_prior: Tensor) -> Tensor:
    r"""Return the set of the :math:`2^n`, ``n <= 16``, with the lowest joint :math:`\Delta F`."""
    best = delta_f_of_all_subsets(posterior, log_prior).argmin()
    return subset_members(best, len(log_prior))


def search_blocks(posterior: Correlated, log_prior: Tensor, size: int = 8) -> Tensor:
    r"""Drop in blocks, by the rule of SPM: many at once where that gains much, or the best of few.

    In each round the candidates are the :math:`m = \max(n / 4, b)` most redundant of the ``n``
    elements that are left, by their own :math:`\Delta F` given what went before, where ``b`` is
    ``size``, at most 16. If there are more elements than candidates, and all candidates together
    gain more than ``m`` nats, they go; otherwise the best subset of the ``b`` most redundant goes.
    It ends where that is the empty one.

    Source: ``spm_dcm_bmr_all`` of SPM (2021 and later), where ``b = 8``; before, as in Friston &
    Penny (2011), NeuroImage 56(4), all subsets of the eight were looked at in every round.
    """
    dropped = torch.zeros_like(log_prior, dtype=torch.bool)
    while not dropped.all():
        left = (~dropped).nonzero()[:, 0]
        rest, rest_log_prior = posterior.split(dropped)[1], log_prior[left]
        ranked = delta_f_spikes(rest, rest_log_prior).argsort()
        most = max(len(left) // 4, size)
        gone = _members(ranked[:most], left)
        together = delta_f_of_set(rest, rest_log_prior, gone)
        if len(left) <= most or together >= -most:
            few = _members(ranked[:size], left)
            gone = torch.zeros_like(few)
            gone[few] = search_all(rest.split(few)[0], rest_log_prior[few])
        if not gone.any():
            break
        dropped[left[gone]] = True
    return dropped


def _members(index: Tensor, of: Tensor) -> Tensor:
    return torch.zeros_like(of, dtype=torch.bool).index_fill_(0, index, True)
