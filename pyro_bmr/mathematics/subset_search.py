"""Which set of correlated elements to drop, where sets are scored as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.evidence import Correlated, delta_f_spike, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.subsets import delta_f_of_all_subsets, subset_members


def search_all(posterior: Correlated, log_prior: Tensor) -> Tensor:
    r"""Return the set of the :math:`2^n`, ``n <= 16``, with the lowest joint :math:`\Delta F`."""
    best = delta_f_of_all_subsets(posterior, log_prior).argmin()
    return subset_members(best, len(log_prior))


def search_blocks(posterior: Dense | LowRank, log_prior: Tensor, size: int = 8) -> Tensor:
    r"""Drop in blocks, as SPM does: all that looks redundant, or the best subset of a few.

    As long as something goes: rank the elements by their own :math:`\Delta F`, given what went
    before. If all with :math:`\Delta F \le 0` together lower the free energy, they go; otherwise
    the best of all subsets of the ``size`` (at most 16) most redundant elements goes.

    Source: Friston & Penny (2011), NeuroImage 56(4); ``spm_dcm_bmr_all`` of SPM12.
    """
    dropped = torch.zeros_like(log_prior, dtype=torch.bool)
    while not dropped.all():
        ahead = (~dropped).nonzero()[:, 0]
        rest, rest_log_prior = posterior.split(dropped)[1], log_prior[ahead]
        alone = delta_f_spike(rest.marginals(), rest_log_prior)
        redundant = alone <= 0
        block = delta_f_spike_chain(rest.split(redundant)[0], rest_log_prior[redundant])
        if block.sum() < 0:
            gone = redundant
        else:
            few = torch.zeros_like(redundant)
            few[alone.topk(min(size, len(alone)), largest=False).indices] = True
            gone = torch.zeros_like(redundant)
            gone[few] = search_all(rest.split(few)[0], rest_log_prior[few])
        if not gone.any():
            break
        dropped[ahead[gone]] = True
    return dropped
