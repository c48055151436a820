"""Units: what a network computes at one index, and all that produces or reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long, device="cpu")


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the unit (int64) that each of its indices belongs to, -1 where none.

    It reads units if the network sums over it (columns of a weight), else produces (rows, a bias).
    """

    units: Tensor
    reads: bool


@dataclass(frozen=True)
class Layer:
    """Units beside each other, in the order of the axis, of which any number may go.

    Named by the first weight that produces them, or reads inputs; else by the first site, such as a
    bias. A unit, channel, head or input.
    """

    name: str
    kind: str
    units: Tensor


HELD = "torch.nn.RNN, LSTM and GRU check their sizes"
"""Why the number of some units has to stay as it is."""


@dataclass(frozen=True)
class Structure:
    """The units of a model: a label stands for the same unit wherever it occurs.

    ``tensors`` are parameters, buffers and constants, by their name in the capture. Layers are
    disjoint and hold every label. ``protected`` says, where that is not plain, why axes of a site
    or tensor cannot be cut. ``released`` is boolean, by label: units that nothing needs once what
    reads them is zero; None if not known. ``nodes`` are the labels per axis of each graph node,
    ``held`` those of units whose number a module of torch compares with a size of its own, and
    ``merged_inputs`` those of elements of an argument that a view of it lays along one axis.
    """

    sites: Mapping[str, tuple[Axis, ...]]
    tensors: Mapping[str, tuple[Axis, ...]]
    layers: tuple[Layer, ...]
    protected: Mapping[str, str]
    released: Tensor | None = None
    nodes: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    held: Tensor = field(default_factory=_none)
    merged_inputs: Tensor = field(default_factory=_none)

    def find_readers(self, name: str) -> set[str]:
        """Return the sites, maybe itself, that read what a site produces and nothing else needs."""
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
