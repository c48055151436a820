"""The joint evidence of any set of groups, and how it changes when one group is dropped or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_bmr.mathematics.couplings import Walk, start_walk
from pyro_bmr.mathematics.evidence import Correlated, delta_f_of_set
from pyro_bmr.mathematics.gaussian import LOG_2PI
from pyro_bmr.mathematics.membership import Membership


@dataclass(frozen=True)
class Coupling:
    """Elements, by their positions, whose posterior (in float64) is correlated."""

    element: Tensor
    posterior: Correlated

    def delta_f(self, dropped: Tensor) -> float:
        """Return what a set costs beyond the costs of its elements, in nats."""
        standard = torch.full_like(self.posterior.loc, -0.5 * LOG_2PI)
        return float(delta_f_of_set(self.posterior, standard, dropped[self.element]))


@dataclass(frozen=True)
class GroupEvidence:
    """What ΔF of any set of groups, which may overlap, follows from; an element counts once.

    ``cost`` is what each element adds to ΔF, in nats and float64: all of it where elements are
    independent, and ln p(θ_i = 0) + ½ ln 2π in a coupling. Couplings share no elements. ``able`` is
    False for groups that cannot go.
    """

    members: Membership
    cost: Tensor
    couplings: tuple[Coupling, ...]
    able: Tensor

    def alone(self) -> Tensor:
        """Return ΔF of each group by itself; ``inf`` for those that cannot go."""
        walk = GroupWalk(self, torch.zeros_like(self.able))
        walk.look(self.able.nonzero()[:, 0])
        return torch.where(self.able, walk.changes(), torch.inf)

    def delta_f(self, dropped: Tensor) -> float:
        """Return the joint ΔF of a set of groups."""
        gone = self.members.element_sums(dropped.long()) > 0
        return float(self.cost[gone].sum()) + sum(c.delta_f(gone) for c in self.couplings)

    @cached_property
    def alone_standing(self) -> Tensor:
        """True for the groups whose ΔF does not depend on what else goes."""
        shared = self.members.element_sums(torch.ones_like(self.able).long()) > 1
        for coupling in self.couplings:
            shared[coupling.element] = True
        return self.members.sums(shared.long()) == 0


class GroupWalk:
    """Stands at a set of groups that are dropped."""

    def __init__(self, evidence: GroupEvidence, dropped: Tensor) -> None:
        self.dropped = dropped.clone()
        self._members, self._cost = evidence.members, evidence.cost
        self._cover = self._members.element_sums(dropped.long())
        # What would go with each group, and what would come back with it.
        self._going = self._members.sums(self._cost * (self._cover == 0))
        self._coming = self._members.sums(self._cost * (self._cover == 1))
        self._coupled, self._has_looked = torch.zeros_like(self._going), False
        self._couplings = [_Coupled(c, self._cover > 0) for c in evidence.couplings]

    @property
    def remembers(self) -> bool:
        """Whether some of what `changes` tells may be what `look` has seen before a flip."""
        return self._has_looked and bool(self._couplings)

    def changes(self) -> Tensor:
        """Tell how ΔF would change by a flip of each group; couplings as ``look`` saw them last."""
        return torch.where(self.dropped, -self._coming, self._going) + self._coupled

    def look(self, groups: Tensor) -> None:
        """Look at what couplings say of some groups."""
        self._has_looked = True
        for drop in (True, False) if self._couplings else ():
            mine = groups[self.dropped[groups] != drop]
            flips = [self._flipped(int(group)) for group in mine]
            self._coupled[mine] = sum(c.changes(flips, drop) for c in self._couplings)

    def flip(self, group: int) -> None:
        """Drop a group, or take it back."""
        members, flipped = self._members.of(group), self._flipped(group)
        drop = not self.dropped[group]
        # Members of one more group that is dropped: they no longer come back with that one alone.
        shared = members[self._cover[members] == (1 if drop else 2)]
        sign = 1 if drop else -1
        self._add(self._going, flipped, -sign)
        self._add(self._coming, flipped, sign)
        self._add(self._coming, shared, -sign)
        self._cover[members] += sign
        self.dropped[group] = drop
        for coupling in self._couplings:
            coupling.step(flipped, drop)

    def _flipped(self, group: int) -> Tensor:
        members = self._members.of(group)
        return members[self._cover[members] == int(self.dropped[group])]

    def _add(self, totals: Tensor, elements: Tensor, sign: int) -> None:
        groups, which = self._members.groups_of(elements)
        totals.index_add_(0, groups, self._cost[elements][which], alpha=sign)


class _Coupled:
    """A walk over the elements of a coupling, which are known by their place among all."""

    def __init__(self, coupling: Coupling, dropped: Tensor) -> None:
        self.place = torch.full_like(dropped, -1, dtype=torch.long)
        self.place[coupling.element] = torch.arange(len(coupling.element), device=dropped.device)
        self.walk: Walk = start_walk(coupling.posterior, dropped[coupling.element])

    def changes(self, flips: Sequence[Tensor], drop: bool) -> Tensor:
        return self.walk.changes([self._mine(flipped) for flipped in flips], drop)

    def step(self, flipped: Tensor, drop: bool) -> None:
        mine = self._mine(flipped)
        if len(mine):
            self.walk.step(mine, drop)

    def _mine(self, elements: Tensor) -> Tensor:
        places = self.place[elements]
        return places[places >= 0]
