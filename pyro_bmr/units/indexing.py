"""Rules of operations that take, lay side by side, or look up parts of tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pyro_bmr.units.labelled import Labelled
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.operation_calls import OperationCall, Result, Rule, aten, broadcast, protect_all


def select(labels: Labels, call: OperationCall) -> Labelled:
    """Take one index of an axis."""
    x: Labelled = call["self"]
    at = call["dim"] % len(x.axes)
    labels.look_up(x.axes[at], "the program takes one index of its axis")
    return x.pick(i for i in range(len(x.axes)) if i != at)


def unbind(labels: Labels, call: OperationCall) -> tuple[Labelled, ...]:
    """Take all indices of an axis."""
    return (select(labels, call),) * len(call.shapes)


def _slice_axis(labels: Labels, call: OperationCall) -> Labelled:
    """Take a range of an axis."""
    x: Labelled = call["self"]
    axis = x.axes[call["dim"]]
    part = axis[slice(call["start"], call["end"], call["step"])]
    if call["step"] != 1:
        labels.look_up(axis, "the program takes every so many of its axis")
    elif len(part) < len(axis):
        _leave_blocks(labels, axis)
    return x.put(call["dim"], part)


def split(labels: Labels, call: OperationCall) -> tuple[Labelled, ...]:
    """Cut an axis into ranges that follow one another."""
    x: Labelled = call["self"]
    at = call["dim"]
    axis = x.axes[at]
    ends = np.cumsum([shape[at] for shape in call.shapes])[:-1]
    if len(call.shapes) > 1:
        _leave_blocks(labels, axis)
    return tuple(x.put(at, part) for part in np.split(axis, ends))


def concatenate(labels: Labels, call: OperationCall) -> Labelled:
    """Lay tensors one after the other."""
    (shape,) = call.shapes
    parts = [x for x in call.tensors if len(x.axes) == len(shape)]
    at = call["dim"] % len(shape)
    whole = np.concatenate([x.axes[at] for x in parts])
    sources = frozenset[int]().union(*(x.sources[at] for x in parts))
    alike = [x.put(at, labels.fixed(1)) for x in parts]
    rest = broadcast(labels, alike, (*shape[:at], 1, *shape[at + 1 :]))
    return rest.put(at, whole, sources)


def stack(labels: Labels, call: OperationCall) -> Labelled:
    """Lay tensors beside each other along a new axis, which is fixed."""
    (shape,) = call.shapes
    at = call["dim"] % len(shape)
    rest = broadcast(labels, call.tensors, (*shape[:at], *shape[at + 1 :]))
    axes = (*rest.axes[:at], labels.fixed(shape[at]), *rest.axes[at:])
    return replace(rest, axes=axes, sources=(*rest.sources[:at], frozenset(), *rest.sources[at:]))


def _embed(labels: Labels, call: OperationCall) -> Labelled:
    """Look up rows of a table."""
    table, indices = call["weight"], call["indices"]
    labels.protect(table.axes[0], "its rows are looked up by data")
    labels.produced |= table.sources[1]
    return Labelled(
        (*indices.axes, table.axes[1]),
        (*indices.sources, table.sources[1]),
        max(table.depth, indices.depth),
    )


def index(labels: Labels, call: OperationCall) -> Result:
    """Look up by one tensor of indices, whose axes replace the axis; protect all if by several."""
    x: Labelled = call["self"]
    indices = call.arguments.get("indices")
    if indices is None:
        indices = [None] * (call["dim"] % len(x.axes)) + [call["index"]]
    at = [i for i, axis in enumerate(indices) if axis is not None]
    (shape,) = call.shapes
    new = len(shape) - len(x.axes) + 1
    if len(at) != 1 or new != len(indices[at[0]].axes):
        return protect_all(labels, call)
    (i,) = at
    labels.look_up(x.axes[i], "its axis is looked up by index")
    looked_up = indices[i]
    return Labelled(
        (*x.axes[:i], *looked_up.axes, *x.axes[i + 1 :]),
        (*x.sources[:i], *looked_up.sources, *x.sources[i + 1 :]),
        max(x.depth, looked_up.depth),
    )


def gather(labels: Labels, call: OperationCall) -> Labelled:
    """Look up elements along an axis; the result has the shape of the indices."""
    x, indices = call["self"], call["index"]
    at = call["dim"] % len(x.axes)
    labels.look_up(x.axes[at], "its axis is looked up by index")
    for i, (axis, other) in enumerate(zip(x.axes, indices.axes, strict=True)):
        if i != at and len(axis) == len(other):
            labels.join(axis, other)
        elif i != at:
            labels.protect(axis, "its axis is looked up by index")
    return replace(indices, depth=max(x.depth, indices.depth))


def pad(labels: Labels, call: OperationCall) -> Labelled:
    """Add constant elements around a tensor; axes that grow are fixed."""
    x, (shape,) = call["self"], call.shapes
    for i, size in enumerate(shape):
        if size != len(x.axes[i]):
            labels.protect(x.axes[i], "its axis is padded")
            x = x.put(i, labels.fixed(size), frozenset())
    return x


INDEXING: dict[Any, Rule] = {
    aten.select: select,
    aten.unbind: unbind,
    aten.slice: _slice_axis,
    **dict.fromkeys(
        (aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes), split
    ),
    aten.cat: concatenate,
    aten.stack: stack,
    aten.embedding: _embed,
    **dict.fromkeys((aten.index, aten.index_select), index),
    aten.gather: gather,
    aten.constant_pad_nd: pad,
}


def _leave_blocks(labels: Labels, axis: Any) -> None:
    """Let blocks be no units where they are told apart by position."""
    if labels.are_blocks(axis):
        labels.look_up(axis, "")
