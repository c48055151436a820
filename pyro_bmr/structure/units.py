"""Units: what a network computes at one index, and all that produces or reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the unit that each of its indices belongs to."""

    units: Tensor
    reads: bool


@dataclass(frozen=True)
class Layer:
    """Units beside each other, of which any number may go."""

    name: str
    kind: str
    units: Tensor


@dataclass(frozen=True)
class Structure:
    """The units of a model."""

    sites: Mapping[str, tuple[Axis, ...]]
    tensors: Mapping[str, tuple[Axis, ...]]
    layers: tuple[Layer, ...]
    protected: Mapping[str, str]
    released: Tensor | None = None
    nodes: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def find_readers(self, name: str) -> set[str]:
        """Return the sites that read what a site produces and nothing else needs."""
        if self.released is None:
            return set()
        labels = [axis.units for axis in self.sites.get(name, ()) if not axis.reads]
        produced = [one[one >= 0] for one in labels]
        released = [one[self.released[one]] for one in produced]
        return {
            other
            for other, axes in self.sites.items()
            for axis in axes
            if axis.reads and any(torch.isin(one, axis.units).any() for one in released)
        }
