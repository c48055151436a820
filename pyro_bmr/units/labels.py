"""Labels of the indices of tensors: fresh, joined, protected."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

from pyro_bmr.units.labelled import (
    CONSTANT,
    DATA,
    FIXED,
    AxisOrigin,
    Ints,
    Labelled,
    Product,
    Protection,
)


@dataclass
class Labels:
    """What is known of the labels so far.

    ``decisions``: by view that splits an axis, which of its parts carries the units (0 is the
    outermost); ``moved``: views of which another part must. ``produced`` and ``read`` are sources;
    ``heads``, ``channels`` and ``data`` (constants, along the axis that is summed over) mark kinds
    of layers, and so do ``merged_inputs`` (axes that a view merges several of an argument into).
    What ``products`` and ``merges`` of axes share is left to the search for components.
    """

    decisions: dict[Hashable, int] = field(default_factory=dict)
    moved: set[Hashable] = field(default_factory=set)
    pairs: list[tuple[Ints, Ints]] = field(default_factory=list)
    protections: list[Protection] = field(default_factory=list)
    merges: list[tuple[Ints, Ints]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    channels: list[Ints] = field(default_factory=list)
    heads: list[Ints] = field(default_factory=list)
    outputs: list[Ints] = field(default_factory=list)
    data: list[Ints] = field(default_factory=list)
    merged_inputs: list[Ints] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    produced: set[int] = field(default_factory=set)
    count: int = 1
    _origins: Ints = field(default_factory=lambda: np.zeros(1024, np.int64))
    _splits: Ints = field(default_factory=lambda: np.full(1024, -1, np.int64))
    _split_names: list[Hashable] = field(default_factory=list)

    def fresh(self, size: int, origin: AxisOrigin, split: Hashable = None) -> Ints:
        """Make labels that nothing has; of blocks, with the view that splits their axis."""
        start, self.count = self.count, self.count + size
        while self.count > len(self._origins):
            self._origins = np.concatenate([self._origins, np.zeros_like(self._origins)])
            self._splits = np.concatenate([self._splits, np.full_like(self._splits, -1)])
        self._origins[start : self.count] = origin
        if split is not None:
            self._splits[start : self.count] = len(self._split_names)
            self._split_names.append(split)
        return np.arange(start, self.count)

    def fixed(self, size: int) -> Ints:
        """Label indices that are never cut."""
        return np.zeros(size, np.int64)

    def create(self, shape: Iterable[int], origin: AxisOrigin = AxisOrigin.CREATED) -> Labelled:
        """Label a tensor that comes from nothing else in the graph."""
        axes = tuple(self.fresh(size, origin) for size in shape)
        depth = {AxisOrigin.INPUT: DATA, AxisOrigin.TENSOR: CONSTANT, AxisOrigin.CREATED: 0.75}.get(
            origin, 0.0
        )
        return Labelled(axes, (frozenset(),) * len(axes), depth if axes else 0.0)

    def origin(self, axis: Ints) -> AxisOrigin:
        """Find the greatest origin among labels."""
        return AxisOrigin(int(self._origins[axis].max(initial=0)))

    def find(self, origin: AxisOrigin) -> Ints:
        """Find all labels of an origin."""
        return np.flatnonzero(self._origins[: self.count] == origin)

    def join(self, first: Ints, second: Ints) -> Ints:
        """Have two axes be the same, index by index, and return the labels to go on with."""
        if first is second:
            return first
        if len(first) == 1:
            # The one index of a new axis says nothing of what it meets.
            if first[0] == FIXED:
                return second
            if second[0] == FIXED:
                return first
        differ = first != second
        if differ.any():
            self.pairs.append((first[differ], second[differ]))
        return np.where(self._origins[first] >= self._origins[second], first, second)

    def protect(self, axis: Ints, reason: str = "", operation: str = "") -> None:
        """Have indices stay; name an operation only if it has no rule."""
        if axis.any():
            self.protections.append(Protection(axis, reason, operation))

    def are_blocks(self, axis: Ints) -> bool:
        """Tell whether labels stand for blocks of an axis that a view splits."""
        return bool((self._splits[axis] >= 0).any())

    def look_up(self, axis: Ints, reason: str) -> None:
        """Have an axis be used by position.

        Blocks of an axis that a view splits are then no units: the parts inside them are.
        """
        if self.are_blocks(axis):
            splits = np.unique(self._splits[axis])
            self.moved |= {self._split_names[i] for i in splits if i >= 0}
        else:
            self.protect(axis, reason)

    def contract(self, first: Labelled, i: int, second: Labelled, j: int) -> None:
        """Sum over the product of two axes; the second reads the first where depths are equal.

        Where they are not, the deeper is the data. Where both come from arguments, none is read.
        """
        self.join(first.axes[i], second.axes[j])
        if first.depth >= DATA and second.depth >= DATA:
            self.produced |= first.sources[i] | second.sources[j]
            return
        data, at_data, weight, at_weight = first, i, second, j
        if second.depth > first.depth:
            data, at_data, weight, at_weight = second, j, first, i
        self.produced |= data.sources[at_data]
        if data.depth == CONSTANT:
            self.data.append(data.axes[at_data])
        self.read |= weight.sources[at_weight]
        # Of weights alone, a product is again a weight.
        if data.depth % 1 or data.depth >= DATA:
            at_weight %= len(weight.axes)
            for k, sources in enumerate(weight.sources):
                if k != at_weight:
                    self.produced |= sources

    def sum_over(self, x: Labelled, i: int) -> None:
        """Sum over an axis, which is read unless it has been produced."""
        sources = x.sources[i]
        if sources & self.produced:
            self.produced |= sources
        elif x.depth:
            self.read |= sources
            if x.depth == CONSTANT:
                self.data.append(x.axes[i])
