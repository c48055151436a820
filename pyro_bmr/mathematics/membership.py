"""Which elements belong to which group, where a group may have any and groups may overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Membership:
    """Pairs of a group (ascending) and one of its elements, as positions; no pair twice."""

    group: Tensor
    element: Tensor
    num_groups: int
    num_elements: int

    def of(self, group: int) -> Tensor:
        """Return the elements of a group."""
        return self.element[self._starts[group] : self._starts[group + 1]]

    def sums(self, values: Tensor) -> Tensor:
        """Add up values over the elements of each group."""
        total = values.new_zeros(self.num_groups)
        return total.index_add_(0, self.group, values[self.element])

    def element_sums(self, values: Tensor) -> Tensor:
        """Add up values over the groups of each element."""
        total = values.new_zeros(self.num_elements)
        return total.index_add_(0, self.element, values[self.group])

    def to(self, device: torch.device) -> Membership:
        """Move to a device."""
        return replace(self, group=self.group.to(device), element=self.element.to(device))

    def only(self, elements: Tensor) -> Membership:
        """Leave out the elements where ``elements`` is False; the numbers of both stay."""
        stay = elements[self.element]
        return replace(self, group=self.group[stay], element=self.element[stay])

    def beside(self, other: Membership) -> Membership:
        """Put the elements of other pairs after these."""
        group = torch.cat([self.group, other.group])
        element = torch.cat([self.element, other.element + self.num_elements])
        order = group.argsort(stable=True)
        total = self.num_elements + other.num_elements
        return Membership(group[order], element[order], self.num_groups, total)

    def groups_of(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Return all groups of some elements, and for each its element's place in ``elements``."""
        starts, groups = self._transposed
        first = starts[elements]
        counts = starts[elements + 1] - first
        which = torch.repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        steps = torch.arange(len(which), device=which.device)
        return groups[steps + (first - before)[which]], which

    @cached_property
    def _starts(self) -> list[int]:
        return _starts(self.group, self.num_groups).tolist()

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        order = self.element.argsort(stable=True)
        return _starts(self.element, self.num_elements), self.group[order]


def _starts(labels: Tensor, count: int) -> Tensor:
    ends = torch.bincount(labels, minlength=count).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])
