"""Rules of operations that show the same elements in another shape."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from pyro_bmr.units.labelled import MERGED, AxisOrigin, Ints, Labelled, Product, spread
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.operation_calls import OperationCall, Rule, aten


def reshape(labels: Labels, x: Labelled, shape: tuple[int, ...], name: Hashable) -> Labelled:
    """Show a tensor in another shape.

    An axis that is split into several keeps its units on one of them: whole blocks. Where several
    are merged into one, it has the units of the one among them that has any. The name stands for
    the operation, whatever the run.

    >>> labels = Labels()
    >>> heads = reshape(labels, labels.create((6,), AxisOrigin.SITE), (3, 2), "view")
    >>> heads.axes
    (array([7, 8, 9]), array([0, 0]))
    >>> reshape(labels, heads, (6,), "view_1").axes
    (array([7, 7, 8, 8, 9, 9]),)
    """
    if 0 in shape:
        return Labelled(tuple(map(labels.fixed, shape)), (frozenset(),) * len(shape), x.depth)
    parts: list[tuple[Ints, frozenset[int]]] = []
    old, new = 0, 0
    while old < len(x.axes) or new < len(shape):
        # The fewest axes of each that have as many elements.
        first, second = old, new
        old, new = min(old + 1, len(x.axes)), min(new + 1, len(shape))
        while (was := prod(x.shape[first:old])) != (now := prod(shape[second:new])):
            if was < now:
                old += 1
            else:
                new += 1
        group = list(zip(x.axes[first:old], x.sources[first:old], strict=True))
        parts += _regroup(labels, group, shape[second:new], (name, first))
    return Labelled(
        tuple(axis for axis, _ in parts), tuple(sources for _, sources in parts), x.depth
    )


def _reorder(_labels: Labels, call: OperationCall) -> Labelled:
    """Permute axes: `t`, `transpose`, `permute`."""
    x: Labelled = call["self"]
    order = list(range(len(x.axes)))
    if "dims" in call.arguments:
        order = [i % len(order) for i in call["dims"]]
    elif order:
        i, j = call.arguments.get("dim0", 0), call.arguments.get("dim1", -1)
        order[i], order[j] = order[j], order[i]
    return x.pick(order)


def expand(labels: Labels, call: OperationCall) -> Labelled:
    """Repeat axes of size 1, which are protected; repeated and new ones get fresh labels."""
    x, (shape,) = call.tensors[0], call.shapes
    result = labels.create(shape)
    for i in range(-len(x.axes), 0):
        if len(x.axes[i]) == shape[i]:
            result = result.put(i, x.axes[i], x.sources[i])
        else:
            labels.protect(x.axes[i])
    return replace(result, depth=x.depth)


def repeat(labels: Labels, call: OperationCall) -> Labelled:
    """Repeat a tensor along axes; where an axis is repeated, so are its labels."""
    x, (shape,) = call.tensors[0], call.shapes
    result = labels.create(shape)
    for i in range(-len(x.axes), 0):
        size = len(x.axes[i])
        if size == 1 < shape[i]:
            labels.protect(x.axes[i])
        else:
            result = result.put(i, np.tile(x.axes[i], shape[i] // size), x.sources[i])
    return replace(result, depth=x.depth)


def insert(labels: Labels, call: OperationCall) -> Labelled:
    """Add an axis of size 1."""
    x: Labelled = call["self"]
    at = call["dim"] % (len(x.axes) + 1)
    axes = (*x.axes[:at], labels.fixed(1), *x.axes[at:])
    return Labelled(axes, (*x.sources[:at], frozenset(), *x.sources[at:]), x.depth)


def squeeze(labels: Labels, call: OperationCall) -> Labelled:
    """Drop axes of size 1, which are protected."""
    x: Labelled = call["self"]
    dims = call.arguments.get("dim", range(len(x.axes)))
    dropped = {i % len(x.axes) for i in ([dims] if isinstance(dims, int) else dims)}
    dropped &= {i for i, size in enumerate(x.shape) if size == 1}
    for i in dropped:
        labels.protect(x.axes[i])
    return x.pick(i for i in range(len(x.axes)) if i not in dropped)


def _view(labels: Labels, call: OperationCall) -> Labelled:
    return reshape(labels, call.tensors[0], call.shapes[0], call.name)


VIEWS: dict[Any, Rule] = {
    **dict.fromkeys((aten.view, aten._unsafe_view, aten._reshape_alias), _view),
    **dict.fromkeys((aten.t, aten.t_, aten.transpose, aten.transpose_, aten.permute), _reorder),
    aten.expand: expand,
    aten.repeat: repeat,
    **dict.fromkeys((aten.unsqueeze, aten.unsqueeze_), insert),
    **dict.fromkeys((aten.squeeze, aten.squeeze_), squeeze),
}


_Part = tuple[Ints, frozenset[int]]


def _regroup(
    labels: Labels, group: list[_Part], shape: tuple[int, ...], name: tuple[Hashable, int]
) -> list[_Part]:
    """Show axes as others with as many elements."""
    if len(group) == len(shape) == 1:
        return group
    ends = {prod(shape[:i]) for i in range(len(shape) + 1)}
    sizes = [len(axis) for axis, _ in group]
    ends |= {prod(sizes[:i]) for i in range(len(sizes) + 1)}
    cuts = sorted(ends)
    if any(after % before for before, after in pairwise(cuts)):
        for axis, _ in group:
            labels.protect(axis, "a view takes its axis apart")
        return [(labels.fixed(size), frozenset()) for size in shape]
    pieces: list[_Part] = []
    start = 1
    for i, (axis, sources) in enumerate(group):
        if len(axis) == 1:
            labels.protect(axis)
            continue
        stop = start * len(axis)
        inner = [b // a for a, b in pairwise(c for c in cuts if start <= c <= stop)]
        pieces += _split(labels, axis, sources, inner, (*name, i))
        start = stop
    result: list[_Part] = []
    for size in shape:
        taken: list[_Part] = []
        while prod(len(axis) for axis, _ in taken) < size:
            taken.append(pieces.pop(0))
        result.append(_merge(labels, taken) if taken else (labels.fixed(1), frozenset()))
    return result


def _split(
    labels: Labels, axis: Ints, sources: frozenset[int], shape: list[int], name: Hashable
) -> list[_Part]:
    """Split an axis; one of its parts carries the units."""
    if len(shape) == 1:
        return [(axis, sources)]
    grid = axis.reshape(shape)
    varies = [i for i in range(len(shape)) if (grid != grid.take([0], i)).any()]
    parts: list[_Part] = [(labels.fixed(size), frozenset()) for size in shape]
    if len(varies) < 2:
        # An axis that was merged before; its units lie along one part.
        carrier = varies[0] if varies else 0
        index = tuple(slice(None) if i == carrier else 0 for i in range(len(shape)))
        parts[carrier] = np.ascontiguousarray(grid[index]), sources
        return parts
    origin, choice = labels.origin(axis), labels.decisions.get(name, 0)
    if origin <= AxisOrigin.INPUT or choice >= len(varies):
        labels.protect(axis, "a view takes its axis apart")
        return parts
    carrier = varies[choice]
    blocks = labels.fresh(shape[carrier], origin, name)
    along = blocks.reshape([-1 if i == carrier else 1 for i in range(len(shape))])
    labels.join(axis, np.broadcast_to(along, shape).reshape(-1))
    if carrier != varies[-1]:
        labels.heads.append(blocks)
    parts[carrier] = blocks, sources
    return parts


def _merge(labels: Labels, parts: list[_Part]) -> _Part:
    """Merge axes; the merged one has the units of that which has any."""
    if len(parts) == 1:
        return parts[0]
    axes = [axis for axis, _ in parts]
    size = prod(map(len, axes))
    origins = [labels.origin(axis) for axis in axes]
    greatest = max(origins)
    if greatest == AxisOrigin.FIXED:
        return labels.fixed(size), frozenset()
    units = [i for i, origin in enumerate(origins) if origin == greatest]
    soft = [
        i for i, origin in enumerate(origins) if AxisOrigin.FIXED < origin <= AxisOrigin.CREATED
    ]
    if len(units) == 1:
        merged, sources = spread(axes, units[0]), parts[units[0]][1]
    else:
        merged = labels.fresh(size, greatest)
        sources = frozenset[int]().union(*(parts[i][1] for i in units))
        if greatest >= AxisOrigin.TENSOR:
            labels.products.append(Product(axes, units, merged))
        elif greatest == AxisOrigin.INPUT:
            labels.merged_inputs.append(merged)
    for i, axis in enumerate(axes):
        if i not in units and origins[i] >= AxisOrigin.TENSOR:
            labels.protect(axis, MERGED)
    labels.merges += [(axes[i], merged) for i in soft if soft != units or len(units) > 1]
    return merged, sources
