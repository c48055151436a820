r"""Walks over the subsets of a correlated posterior, in steps of many elements.

Of :math:`\Delta F_S = \sum_{i \in S} \ln p(\theta_i = 0) - \ln q(\theta_S = 0)` a walk tells

.. math:: h(S) = \tfrac12 \ln |\Sigma_{SS}| + \tfrac12 \mu_S^\top \Sigma_{SS}^{-1} \mu_S
          = -\ln q(\theta_S = 0) - \tfrac{|S|}{2} \ln 2\pi,

or rather how it changes when elements join :math:`S` or leave it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.tableau import make_tableau


def start_walk(posterior: Dense | LowRank, dropped: Tensor) -> Walk:
    """Start a walk at the subset where ``dropped`` is True, of a posterior in float64."""
    return _WALK[type(posterior)](posterior, dropped.clone())


class Walk(ABC):
    """Stands at a subset of the elements of a correlated posterior."""

    @abstractmethod
    def changes(self, sets: Sequence[Tensor], drop: bool) -> Tensor:
        """Tell by how many nats each step, from where the walk stands, would change h.

        The elements (positions) of a set join the subset where ``drop``, or else leave it; ``inf``
        where rounding has left nothing to go by.
        """

    @abstractmethod
    def step(self, elements: Tensor, drop: bool) -> None:
        """Let elements join the subset where ``drop``, or else leave it."""


# After so many steps a tableau is made anew.
_STEPS_A_TABLEAU = 50
# Numbers in the matrices of a batch of sets.
_BATCH = 1 << 23


class _DenseWalk(Walk):
    # A step with elements C changes h by ½ ln |±T| ± ½ tᵀ (±T)⁻¹ t, with T their rows and columns
    # in the tableau and t their edge; T is negative where C is in the subset.

    def __init__(self, posterior: Dense, dropped: Tensor) -> None:
        self.posterior, self.dropped = posterior, dropped
        self.tableau, self.steps = make_tableau(posterior, dropped), 0

    @override
    def changes(self, sets: Sequence[Tensor], drop: bool) -> Tensor:
        sign = 1.0 if drop else -1.0
        result = self.posterior.loc.new_zeros(len(sets))
        for which, index in _batches(sets, lambda size: size * size):
            block = self.tableau[index[:, :, None], index[:, None, :]]
            edge = self.tableau[index, -1]
            tril, failed = torch.linalg.cholesky_ex(sign * block)
            whitened = torch.linalg.solve_triangular(tril, edge[..., None], upper=False)[..., 0]
            change = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            change = change + sign * 0.5 * whitened.square().sum(-1)
            result[which] = torch.where((failed == 0) & change.isfinite(), change, torch.inf)
        return result

    @override
    def step(self, elements: Tensor, drop: bool) -> None:
        self.dropped[elements] = drop
        self.steps += 1
        sign = 1.0 if drop else -1.0
        columns = self.tableau[:, elements]
        tril, failed = torch.linalg.cholesky_ex(sign * columns[elements])
        if failed or self.steps % _STEPS_A_TABLEAU == 0:
            self.tableau = make_tableau(self.posterior, self.dropped)
            return
        gain = torch.cholesky_solve(columns.mT, tril)
        self.tableau.addmm_(columns, gain, alpha=-sign)
        self.tableau[elements] = gain
        self.tableau[:, elements] = gain.mT
        self.tableau[elements[:, None], elements] = -sign * torch.cholesky_inverse(tril)


class _LowRankWalk(Walk):
    # With K = I + Σ w wᵀ / d and b = Σ w μ / d over the subset, h = ½ Σ (ln d + μ² / d) + ½ ln |K|
    # − ½ bᵀ K⁻¹ b: all but the last two adds up, and so do K and b.

    def __init__(self, posterior: LowRank, dropped: Tensor) -> None:
        self.posterior = posterior
        rank = posterior.cov_factor.shape[-1]
        self.precision = torch.eye(rank, dtype=posterior.loc.dtype, device=posterior.loc.device)
        self.linear = torch.zeros_like(self.precision[0])
        self.own = 0.5 * (posterior.cov_diag.log() + posterior.loc.square() / posterior.cov_diag)
        self.step(dropped.nonzero()[:, 0], True)

    @override
    def changes(self, sets: Sequence[Tensor], drop: bool) -> Tensor:
        sign = 1.0 if drop else -1.0
        result = self.posterior.loc.new_zeros(len(sets))
        here = _log_normalizer(self.precision, self.linear)
        rank = len(self.linear)
        for which, index in _batches(sets, lambda size: rank * (size + rank)):
            precision, linear = self._sums(index)
            there = _log_normalizer(self.precision + sign * precision, self.linear + sign * linear)
            change = sign * self.own[index].sum(-1) + there - here
            result[which] = torch.where(change.isfinite(), change, torch.inf)
        return result

    @override
    def step(self, elements: Tensor, drop: bool) -> None:
        precision, linear = self._sums(elements)
        sign = 1.0 if drop else -1.0
        self.precision = self.precision + sign * precision
        self.linear = self.linear + sign * linear

    def _sums(self, index: Tensor) -> tuple[Tensor, Tensor]:
        some = self.posterior.select(index)
        weighted = (some.cov_factor / some.cov_diag[..., None]).mT
        return weighted @ some.cov_factor, (weighted @ some.loc[..., None])[..., 0]


def _log_normalizer(precision: Tensor, linear: Tensor) -> Tensor:
    tril, failed = torch.linalg.cholesky_ex(precision)
    whitened = torch.linalg.solve_triangular(tril, linear[..., None], upper=False)[..., 0]
    value = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * whitened.square().sum(-1)
    return torch.where(failed == 0, value, torch.nan)


def _batches(
    sets: Sequence[Tensor], numbers: Callable[[int], int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Put sets of one size together, but no more than what makes so many numbers."""
    sizes = torch.tensor([len(one) for one in sets], device="cpu")
    for size in sizes.unique().tolist():
        if not size:
            continue
        which = (sizes == size).nonzero()[:, 0]
        for part in which.split(max(1, _BATCH // numbers(size))):
            yield part.to(sets[0].device), torch.stack([sets[i] for i in part.tolist()])


_WALK: dict[type, Callable[..., Walk]] = {Dense: _DenseWalk, LowRank: _LowRankWalk}
