"""Scores: what a selection looks at before it decides what to drop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.factors.factor import Factor, Search
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.switched import SwitchedFactor
from pyro_bmr.mathematics.evidence import sum_dropped
from pyro_bmr.mathematics.transfers import to_numbers
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.group_members import GroupLayer


class Scores(ABC):
    """What there is to drop, and the evidence of dropping it: elements, or groups of them.

    Every mapping goes from a name to a tensor of one value per item: of elements, from the name of
    a reducible site to a tensor of its shape; of groups, from the name of a layer to a vector.

    Parameters
    ----------
    delta_f : mapping
        ΔF in nats of dropping each item by itself; ``inf`` where that is impossible, 0 where it was
        pruned before.
    """

    delta_f: Mapping[str, Tensor]

    @property
    @abstractmethod
    def loc(self) -> Mapping[str, Tensor]:
        """Posterior mean, 0 if pruned before; of a group, the root mean square of its elements'."""

    @property
    @abstractmethod
    def scale(self) -> Mapping[str, Tensor]:
        """Posterior standard deviation, 0 if pruned before; of a group, the root mean square."""

    @property
    @abstractmethod
    def kept(self) -> Mapping[str, Tensor]:
        """True for items of which something has not been pruned before."""

    @cached_property
    def unscored(self) -> dict[str, int]:
        """By name, how many items cannot go."""
        some = {name: scores for name, scores in self.delta_f.items() if scores.numel()}
        highest = dict(zip(some, to_numbers([one.max() for one in some.values()]), strict=True))
        closed = [name for name, high in highest.items() if high == math.inf]
        counts = to_numbers([some[name].isposinf().sum() for name in closed])
        return dict.fromkeys(self.delta_f, 0) | dict(zip(closed, counts, strict=True))

    @abstractmethod
    def elimination(self) -> dict[str, Tensor]:
        """Return the ΔF at which each item falls when the cheapest always goes first.

        Independent items fall at their own ΔF. Correlated ones, and groups that share elements,
        are scored again after each removal, given all that went before.

        Returns
        -------
        dict of Tensor
            In nats.
        """

    @abstractmethod
    def search(self, choose: Search, margin: float = 0.0) -> dict[str, Tensor]:
        """Search sets of items that depend on each other; others each decide for themselves.

        Parameters
        ----------
        choose : callable
            From a correlated posterior and ln p(θ = 0) of its elements to a boolean tensor, True
            for those to drop. Groups take what answers to it among groups.
        margin : float
            In nats: what dropping an item costs beyond its ΔF.

        Returns
        -------
        dict of Tensor
            By name, True where kept.
        """

    @property
    @abstractmethod
    def decision(self) -> Decision | None:
        """What can be measured: the posterior with its model and data; None without data."""

    @abstractmethod
    def given(self, masks: Mapping[str, Tensor]) -> Scores:
        """Score what is left once some items are gone.

        Parameters
        ----------
        masks : mapping
            By name, True for items that are kept.

        Returns
        -------
        Scores
            Of the same items; those that are gone have the score 0.
        """

    @abstractmethod
    def joint_delta_f(self, masks: Mapping[str, Tensor]) -> float:
        """Return ΔF in nats of all that is dropped together.

        Parameters
        ----------
        masks : mapping
            By name, True for items that are kept.

        Returns
        -------
        float
            In closed form.
        """

    @abstractmethod
    def item_sums(self, by_site: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add up over each item what stands at its elements, those apart that it sets free.

        Parameters
        ----------
        by_site : mapping
            By reducible site, a value per element; a site that is not here counts as 0.

        Returns
        -------
        dict of Tensor
            By name.
        """

    @abstractmethod
    def without_unread(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Drop also what nothing reads any more, or what only reads what is always zero.

        Parameters
        ----------
        masks : mapping
            By name, True for items that are kept.

        Returns
        -------
        mapping
            Masks; where elements stand for themselves they are a `TrimmedMasks`, so that ΔF counts
            such elements by their divergence from the prior. Groups stay as they are.
        """

    @property
    @abstractmethod
    def layers(self) -> tuple[GroupLayer, ...]:
        """The layers that groups are in; none where elements stand for themselves."""

    @abstractmethod
    def layer_delta_f(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """By layer, its part of the joint ΔF in nats of all that is dropped.

        Parameters
        ----------
        masks : mapping
            By name, True for items that are kept.

        Returns
        -------
        dict of float
            An element that goes with groups of several layers counts in the first.
        """

    @abstractmethod
    def released_delta_f(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """By reducible site, what ΔF in nats is less than that of spikes alone.

        Parameters
        ----------
        masks : mapping
            By name, True for items that are kept.

        Returns
        -------
        dict of float
            Because of elements on which nothing depends any more; see ``GroupScores``.
        """

    @abstractmethod
    def constrained(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take back what has to stay by the options of a grouping, the dearest first.

        Parameters
        ----------
        masks : mapping
            By name, True for items that a selection keeps.

        Returns
        -------
        dict of Tensor
            By name, True for items that stay.
        """

    @abstractmethod
    def element_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tell which elements stay.

        Parameters
        ----------
        masks : mapping
            By name, True for items that are kept.

        Returns
        -------
        dict of Tensor
            By reducible site.
        """

    @abstractmethod
    def obstacles(self, name: str) -> list[str]:
        """Say why items cannot go, or what is known of their prior.

        Parameters
        ----------
        name : str
            Of a site, or of a layer of groups.

        Returns
        -------
        list of str
            May be empty.
        """


class TrimmedMasks(dict[str, Tensor]):
    """Masks by site, and in ``unread``, by site, which elements nothing depends on any more."""

    def __init__(self, masks: Mapping[str, Tensor], unread: Mapping[str, Tensor]) -> None:
        super().__init__({n: m & ~unread[n] if n in unread else m for n, m in masks.items()})
        self.unread = unread


def _find_nothing(_masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {}


FindUnread = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ElementScores(Scores):
    """The reducible sites of a posterior and the evidence of dropping each element.

    ``decision`` is what can be measured; its masks are of what is left. ``find_unread`` tells from
    masks, by site, which elements nothing depends on.
    """

    factors: tuple[Factor, ...]
    delta_f: Mapping[str, Tensor]
    decision: Decision | None = None
    find_unread: FindUnread = _find_nothing

    @cached_property
    def loc(self) -> dict[str, Tensor]:
        """Posterior mean of each element, 0 where it was pruned before."""
        return {
            name: loc
            for factor in self.factors
            for name, loc in factor.locations().items()
            if name in self.delta_f
        }

    @cached_property
    def scale(self) -> dict[str, Tensor]:
        """Posterior standard deviation of each element, 0 where it was pruned before."""
        return {
            name: marginal.scale
            for factor in self.factors
            for name, marginal in factor.marginals().items()
            if name in self.delta_f
        }

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """True for the elements that have not been pruned before."""
        return {
            name: kept
            for factor in self.factors
            for name, kept in factor.kept().items()
            if name in self.delta_f
        }

    @override
    def elimination(self) -> dict[str, Tensor]:
        path: dict[str, Tensor] = {}
        for factor in self.factors:
            path |= factor.elimination(self.delta_f)
        return path

    @override
    def search(self, choose: Search, margin: float = 0.0) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for factor in self.factors:
            masks |= factor.search(self.delta_f, choose, margin)
        return masks

    @property
    def layers(self) -> tuple[GroupLayer, ...]:
        """None: see `Scores.layers`."""
        return ()

    @override
    def layer_delta_f(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    @override
    def released_delta_f(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        unread = masks.unread if isinstance(masks, TrimmedMasks) else {}
        factors = (f for f in self.factors if not unread.keys().isdisjoint(f.releasable))
        released = {name: one for f in factors for name, one in f.released().items()}
        return {
            name: float(torch.where(mine, released[name] - self.delta_f[name], 0).sum())
            for name, mine in unread.items()
        }

    @override
    def given(self, masks: Mapping[str, Tensor]) -> ElementScores:
        # What took another prior than the spike has not gone.
        factors = (f if isinstance(f, SwitchedFactor) else f.prune(masks) for f in self.factors)
        decision = self.decision and self.decision.and_drop(masks)
        return replace(score(tuple(factors)), decision=decision, find_unread=self.find_unread)

    @override
    def joint_delta_f(self, masks: Mapping[str, Tensor]) -> float:
        return sum(self.parts(masks).values()) + sum(self.released_delta_f(masks).values())

    def parts(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Return by site its part of the joint ΔF of what masks drop, in nats, as spikes.

        Parameters
        ----------
        masks : mapping
            By reducible site, True for what is kept.

        Returns
        -------
        dict of float
            Of the sites of ``masks``.
        """
        parts: dict[str, float] = {}
        sums: dict[str, Tensor] = {}
        for factor in self.factors:
            if type(factor) is not IndependentFactor:
                parts |= factor.delta_f(self.delta_f, masks)
            elif factor.priors and factor.site.name in masks:
                name = factor.site.name
                sums[name] = sum_dropped(self.delta_f[name], masks[name])
        return parts | dict(zip(sums, to_numbers(list(sums.values())), strict=True))

    @override
    def item_sums(self, by_site: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: by_site.get(n, torch.zeros_like(one)) for n, one in self.delta_f.items()}

    @override
    def without_unread(self, masks: Mapping[str, Tensor]) -> TrimmedMasks:
        return TrimmedMasks(masks, self.find_unread(masks))

    @override
    def constrained(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return masks

    @override
    def element_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(masks)

    @override
    def obstacles(self, name: str) -> list[str]:
        (factor,) = (factor for factor in self.factors if name in factor.priors)
        notes = [factor.priors[name].note]
        if isinstance(factor, SwitchedFactor):
            refused = factor.refused(self.delta_f).get(name, 0)
            notes += [f"{refused:,} {factor.refusal}, kept"] if refused else []
        return [note for note in notes if note]


def score(factors: tuple[Factor, ...]) -> ElementScores:
    """Score the removal of every element that may be reduced."""
    delta_f: dict[str, Tensor] = {}
    for factor in factors:
        delta_f |= factor.scores()
    return ElementScores(factors, delta_f)
