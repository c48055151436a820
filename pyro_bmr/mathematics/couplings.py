r"""Walks over the subsets of a correlated posterior, in steps of one element or of many.

Of :math:`\Delta F_S = \sum_{i \in S} \bigl[\ln p(\theta_i = 0) + \tfrac12 \ln 2\pi\bigr] + h(S)` a
walk tells how :math:`h` changes when elements join :math:`S` or leave it. Where priors are
independent,

.. math:: h(S) = \tfrac12 \ln |\Sigma_{SS}| + \tfrac12 \mu_S^\top \Sigma_{SS}^{-1} \mu_S
          = -\ln q(\theta_S = 0) - \tfrac{|S|}{2} \ln 2\pi;

where they are not, see `pyro_bmr.mathematics.contrast`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.mathematics.contrast import Contrast
from pyro_bmr.mathematics.evidence import Correlated
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.singular_contrast import SingularContrast
from pyro_bmr.mathematics.tableau import (
    flips,
    make_tableau,
    pair_flips,
    step_costs,
    sweep,
    tableau_of_part,
)


def start_walk(posterior: Correlated, dropped: Tensor) -> Any:
    """Start a walk at the subset where ``dropped`` is True, of a posterior in float64.

    An `ElementWalk`, but for a `LowRank` posterior.
    """  # noqa: DOC201
    return _WALK[type(posterior)](posterior, dropped.clone())


class Walk(ABC):
    """Stands at a subset of the elements of a correlated posterior."""

    dropped: Tensor

    @abstractmethod
    def changes(self, sets: Sequence[Tensor], drop: bool) -> Tensor:
        """Tell by how many nats each step, from where the walk stands, would change h.

        The elements (positions) of a set join the subset where ``drop``, or else leave it; ``inf``
        where rounding has left nothing to go by.
        """

    @abstractmethod
    def step(self, elements: Tensor, drop: bool) -> None:
        """Let elements join the subset where ``drop``, or else leave it."""


class ElementWalk(Walk):
    """A walk that knows what each element, and each pair, would change."""

    @abstractmethod
    def flips(self) -> Tensor:
        """Tell by how many nats it would change h to flip each element; as `changes`."""

    @abstractmethod
    def pair_flips(self) -> Tensor:
        """Tell the same of flipping two elements; ``inf`` on the diagonal."""

    def flip(self, index: int) -> None:
        """Drop an element, or take it back."""
        here = torch.tensor([index], device=self.dropped.device)
        self.step(here, not bool(self.dropped[index]))


# After so many steps tableaus are made anew.
_STEPS_A_TABLEAU = 100
# Numbers in the matrices of a batch of sets.
_BATCH = 1 << 23


class _TableauWalk(ElementWalk):
    # A step with elements C changes what a tableau adds to h by ½ ln |±T| ± ½ tᵀ (±T)⁻¹ t, with T
    # the rows and columns of C, and t their edge.

    def __init__(
        self,
        makers: Sequence[Callable[[Tensor], Tensor]],
        signs: Sequence[float],
        dropped: Tensor,
    ) -> None:
        self.makers, self.signs, self.dropped = makers, signs, dropped
        self._remake()

    def _remake(self) -> None:
        self.tableaus = [make(self.dropped) for make in self.makers]
        self.steps = 0

    @override
    def flips(self) -> Tensor:
        return self._sum(flips)

    @override
    def pair_flips(self) -> Tensor:
        return self._sum(pair_flips)

    @override
    def changes(self, sets: Sequence[Tensor], drop: bool) -> Tensor:
        result = self.tableaus[0].new_zeros(len(sets))
        for which, index in _batches(sets, lambda size: size * size):
            total = torch.zeros_like(result[which])
            for tableau, sign in zip(self.tableaus, self.signs, strict=True):
                total = total + sign * step_costs(tableau, self.dropped, index, drop)
            result[which] = torch.where(total.isfinite(), total, torch.inf)
        return result

    @override
    def step(self, elements: Tensor, drop: bool) -> None:
        self.dropped[elements] = drop
        self.steps += 1
        if self.steps % _STEPS_A_TABLEAU == 0:
            self._remake()
            return
        if not all([sweep(tableau, self.dropped, elements, drop) for tableau in self.tableaus]):
            self._remake()

    def _sum(self, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        parts = [
            sign * score(tableau, self.dropped)
            for tableau, sign in zip(self.tableaus, self.signs, strict=True)
        ]
        total = torch.stack(parts).sum(0)
        return torch.where(total.isfinite(), total, torch.inf)


# Of so many elements, those that are cheapest to flip, pairs are looked at anew.
_MOST_IN_PAIRS = 12


class _BruteWalk(ElementWalk):
    """Looks at every set anew, where some elements may determine others."""

    def __init__(self, posterior: SingularContrast, dropped: Tensor) -> None:
        self.posterior, self.dropped = posterior, dropped

    @override
    def flips(self) -> Tensor:
        index = torch.arange(self.posterior.size, device=self.dropped.device)
        return self._changes(index[:, None])

    @override
    def pair_flips(self) -> Tensor:
        alone = self.flips()
        cheap = alone.topk(min(_MOST_IN_PAIRS, len(alone)), largest=False).indices
        pairs = torch.combinations(cheap)
        change = alone.new_full((len(alone), len(alone)), torch.inf)
        change[pairs[:, 0], pairs[:, 1]] = change[pairs[:, 1], pairs[:, 0]] = self._changes(pairs)
        return change

    @override
    def changes(self, sets: Sequence[Tensor], drop: bool) -> Tensor:
        result = self.posterior.loc.new_zeros(len(sets))
        for which, index in _batches(sets, lambda _: self.posterior.size**2):
            result[which] = self._changes(index)
        return result

    @override
    def step(self, elements: Tensor, drop: bool) -> None:
        self.dropped[elements] = drop

    def _changes(self, index: Tensor) -> Tensor:
        sets = self.dropped.repeat(len(index), 1)
        there = sets.scatter(1, index, ~sets.gather(1, index))
        return self.posterior.of_sets(there) - self.posterior.of_sets(self.dropped[None])


class _LowRankWalk(Walk):
    # With K = I + Σ w wᵀ / d and b = Σ w μ / d over the subset, h = ½ Σ (ln d + μ² / d) + ½ ln |K|
    # − ½ bᵀ K⁻¹ b: all but the last two adds up, and so do K and b.

    def __init__(self, posterior: LowRank, dropped: Tensor) -> None:
        self.posterior, self.dropped = posterior, torch.zeros_like(dropped)
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
        self.dropped[elements] = drop
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


def _walk_dense(posterior: Dense, dropped: Tensor) -> Walk:
    return _TableauWalk([partial(make_tableau, posterior)], [1.0], dropped)


def _walk_contrast(contrast: Contrast, dropped: Tensor) -> Walk:
    makers = [partial(tableau_of_part, part.matrix, part.edge) for part in contrast.parts]
    return _TableauWalk(makers, [part.sign for part in contrast.parts], dropped)


_WALK: dict[type, Callable[..., Walk]] = {
    Dense: _walk_dense,
    LowRank: _LowRankWalk,
    Contrast: _walk_contrast,
    SingularContrast: _BruteWalk,
}
