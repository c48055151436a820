"""Labels of tensors as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FIXED = 0
"""The label of what is never cut: positions in images, the inside of a head."""

DATA = 1000.0
"""The depth of the arguments of the model."""

CONSTANT = 0.5
"""The depth of constants, which may be data too; what the program makes of them has more."""


MERGED = "a view merges its axis with another"
"""Why an axis is protected that lies in a merged one beside that which has the units."""


class AxisOrigin(IntEnum):
    """Where a label comes from; where two meet, the greater stands for both."""

    FIXED = 0
    INPUT = 1
    CREATED = 2
    TENSOR = 3
    SITE = 4


@dataclass(frozen=True)
class Labelled:
    """The labels of a tensor: for each axis one per index, and its sources.

    Sources are the axes of sites and of other tensors whose indices those of the axis are. The
    depth counts the contractions that have gone in, and `DATA` more if arguments of the model have.
    """

    axes: tuple[Ints, ...]
    sources: tuple[frozenset[int], ...]
    depth: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(len(axis) for axis in self.axes)

    def pick(self, axes: Iterable[int]) -> Labelled:
        """Take some of the axes, in this order."""
        order = list(axes)
        return replace(
            self,
            axes=tuple(self.axes[i] for i in order),
            sources=tuple(self.sources[i] for i in order),
        )

    def put(self, position: int, axis: Ints, sources: frozenset[int] | None = None) -> Labelled:
        """Replace the labels of an axis, and its sources where they are given."""
        position %= len(self.axes)
        axes, all_sources = list(self.axes), list(self.sources)
        axes[position] = axis
        if sources is not None:
            all_sources[position] = sources
        return replace(self, axes=tuple(axes), sources=tuple(all_sources))


@dataclass(frozen=True)
class Product:
    """An axis that merges several with units of their own, of which one can keep them.

    ``units`` are the positions of those that have any.
    """

    axes: list[Ints]
    units: list[int]
    merged: Ints


@dataclass(frozen=True)
class Protection:
    """Labels that cannot be cut, why (if not plain), and the operation if it has no rule."""

    labels: Ints
    reason: str = ""
    operation: str = ""


def spread(axes: list[Ints], carrier: int) -> Ints:
    """Lay the labels of one axis over all elements of several."""
    along = axes[carrier].reshape([-1 if i == carrier else 1 for i in range(len(axes))])
    return np.broadcast_to(along, [len(axis) for axis in axes]).reshape(-1)
