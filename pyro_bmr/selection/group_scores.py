"""Scores of groups: the same questions as of elements, with one value per group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.factors.factor import Search
from pyro_bmr.mathematics.group_evidence import Coupling, GroupEvidence
from pyro_bmr.mathematics.group_search import eliminate_groups, take_back
from pyro_bmr.mathematics.group_subsets import search_all_groups, search_best_groups
from pyro_bmr.mathematics.membership import Membership
from pyro_bmr.mathematics.subset_search import search_all, search_best
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.group_members import GroupLayer, Groups
from pyro_bmr.selection.scores import ElementScores, Scores


@dataclass(frozen=True)
class GroupScores(Scores):
    r"""The groups of a posterior and the joint evidence of dropping each.

    Once what reads a unit is zero, the likelihood is the same whatever produces it. Producers that
    are independent, with Gaussian priors, then have their prior for a posterior: each adds
    :math:`-KL(q \,\|\, p)` to :math:`\Delta F`. All other elements are spikes.

    ``groups`` count elements in the order of the sites in ``elements.delta_f``.
    """

    elements: ElementScores
    groups: Groups

    @property
    def layers(self) -> tuple[GroupLayer, ...]:
        """The layers that groups are in."""
        return self.groups.layers

    # A field of `ElementScores`, so that the interface can only announce it.
    @cached_property
    def delta_f(self) -> dict[str, Tensor]:  # type: ignore[override]
        """See `Scores`."""
        return self._by_layer(self._evidence.alone())

    @cached_property
    def loc(self) -> dict[str, Tensor]:
        """Root mean square of the posterior means of the elements that are left."""
        return self._by_layer(self._mean_square(self.elements.loc).sqrt())

    @cached_property
    def scale(self) -> dict[str, Tensor]:
        """Root mean square of the posterior standard deviations of the elements that are left."""
        return self._by_layer(self._mean_square(self.elements.scale).sqrt())

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """True for groups of which an element has not been pruned before."""
        return self._by_layer(self._sizes > 0)

    @override
    def elimination(self) -> dict[str, Tensor]:
        return self._by_layer(eliminate_groups(self._evidence))

    @override
    def search(self, choose: Search, margin: float = 0.0) -> dict[str, Tensor]:
        if choose not in _AMONG_GROUPS:
            msg = (
                "got a selection that searches sets of elements only. Expected by_evidence() or "
                "exhaustive(), or one that ranks, such as top_k(10), for groups other than elements"
            )
            raise ValueError(msg)
        if math.isinf(margin):
            return self._by_layer(~self._evidence.able | (margin > 0))
        # The margin is for each element that goes.
        count = self._members.num_elements
        price = torch.cat([self._evidence.cost[:count] + margin, self._evidence.cost[count:]])
        evidence = replace(self._evidence, cost=price)
        return self._by_layer(~_AMONG_GROUPS[choose](evidence))

    @override
    def obstacles(self, name: str) -> list[str]:
        return ["groups with an element that cannot go by itself"]

    @override
    def element_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gone = self._members.element_sums(self._dropped(masks).long()) > 0
        sizes = [kept.numel() for kept in self.elements.kept.values()]
        parts = (~gone).split(sizes) if sizes else ()
        return {
            name: part.reshape(kept.shape)
            for (name, kept), part in zip(self.elements.kept.items(), parts, strict=True)
        }

    @override
    def constrained(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dropped = self._dropped(masks)
        for layer in self.layers:
            mine = torch.arange(layer.count, device=dropped.device) + layer.start
            kept = int((~dropped[mine]).sum())
            missing = layer.must_keep(kept) - kept
            if missing:
                alive = mine[self._sizes[mine] > 0]
                dropped = take_back(self._evidence, dropped, alive, missing)
        return self._by_layer(~dropped)

    @override
    def layer_delta_f(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        dropped, so_far = self._dropped(masks), torch.zeros_like(self._evidence.able)
        parts, before = {}, 0.0
        for layer in self.layers:
            so_far[layer.slice] = dropped[layer.slice]
            after = self._evidence.delta_f(so_far)
            parts[layer.name], before = after - before, after
        return parts

    @property
    def decision(self) -> Decision | None:
        """See `Scores.decision`."""
        return self.elements.decision

    @override
    def given(self, masks: Mapping[str, Tensor]) -> GroupScores:
        return GroupScores(self.elements.given(self.element_masks(masks)), self.groups)

    @override
    def joint_delta_f(self, masks: Mapping[str, Tensor]) -> float:
        return self._evidence.delta_f(self._dropped(masks))

    @override
    def item_sums(self, by_site: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self._flat(self.elements.item_sums(by_site)).double()
        return self._by_layer(self._members.sums(values) - self._producers.sums(values))

    @override
    def without_unread(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return masks

    @override
    def released_delta_f(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        dropped = self._dropped(masks)
        gain = torch.where(self._producers.element_sums(dropped.long()) > 0, self._gain, 0)
        sizes = [kept.numel() for kept in self.elements.kept.values()]
        parts = gain.split(sizes) if sizes else ()
        return {n: float(part.sum()) for n, part in zip(self.elements.kept, parts, strict=True)}

    @cached_property
    def _members(self) -> Membership:
        """Of what has not been pruned before."""
        kept = self._flat(self.elements.kept)
        return self.groups.members.to(kept.device).only(kept)

    @cached_property
    def _sizes(self) -> Tensor:
        kept = self._flat(self.elements.kept)
        return self._members.sums(kept.long())

    @cached_property
    def _evidence(self) -> GroupEvidence:
        scores = self.elements.delta_f
        impossible = self._flat(scores).isposinf()
        cost = torch.zeros_like(impossible, dtype=torch.float64)
        index, start = {}, 0
        for name, one in scores.items():
            index[name] = torch.arange(start, start + one.numel(), device=one.device)
            index[name] = index[name].reshape(one.shape)
            start += one.numel()
        couplings = []
        for factor in self.elements.factors:
            terms = factor.terms(scores, index)
            cost[terms.element] = terms.cost
            if terms.posterior is not None and len(terms.element):
                couplings.append(Coupling(terms.element, terms.posterior))
        able = self._members.sums(impossible.long()) == 0
        # What a producer gains beside its spike counts once, like an element of its own.
        members = self._members.beside(self._producers)
        return GroupEvidence(members, torch.cat([cost, self._gain]), tuple(couplings), able)

    @cached_property
    def _producers(self) -> Membership:
        """Of what has not been pruned before."""
        kept = self._flat(self.elements.kept)
        return self.groups.producers.to(kept.device).only(kept)

    @cached_property
    def _gain(self) -> Tensor:
        """What ΔF of an element is less if nothing depends on it than if it is a spike."""
        released = {name: one for f in self.elements.factors for name, one in f.released().items()}
        gain = {
            name: released[name] - spike if name in released else torch.zeros_like(spike)
            for name, spike in self.elements.delta_f.items()
        }
        values = self._flat(gain).double()
        return torch.where(values.isfinite(), values, 0)

    def _dropped(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Over all groups, True for those that masks drop or of which nothing is left."""
        dropped = self._sizes == 0
        for layer in self.layers:
            if layer.name in masks:
                dropped[layer.slice] |= ~masks[layer.name]
        return dropped

    def _mean_square(self, by_site: Mapping[str, Tensor]) -> Tensor:
        total = self._members.sums(self._flat(by_site).double().square())
        return total / self._sizes.clamp(min=1)

    def _by_layer(self, values: Tensor) -> dict[str, Tensor]:
        return {layer.name: values[layer.slice] for layer in self.layers}

    def _flat(self, by_site: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([by_site[name].reshape(-1) for name in self.elements.delta_f])


# What answers to a search among elements.
_AMONG_GROUPS: dict[Any, Callable[[GroupEvidence], Tensor]] = {
    search_best: search_best_groups,
    search_all: search_all_groups,
}
