"""Rules of operations that sum over the product of two axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_bmr.units.labelled import AxisOrigin, Labelled
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.operation_calls import OperationCall, Rule, aten, broadcast


def _multiply(labels: Labels, first: Labelled, second: Labelled) -> Labelled:
    """Multiply matrices, or batches of them, or vectors."""
    over = -2 if len(second.axes) > 1 else -1
    labels.contract(first, -1, second, over)
    axes, sources = [*first.axes[:-1]], [*first.sources[:-1]]
    for i in range(len(second.axes) - 2):
        axes[i] = labels.join(axes[i], second.axes[i])
        sources[i] |= second.sources[i]
    if over == -2:
        axes.append(second.axes[-1])
        sources.append(second.sources[-1])
    return Labelled(tuple(axes), tuple(sources), max(first.depth, second.depth) + 1)


def _convolve(labels: Labels, call: OperationCall) -> Labelled:
    """Convolve, also transposed, or in groups.

    A group is one unit: all channels that it reads and all that it produces. Positions are fixed.
    """
    x, weight, bias = call["input"], call["weight"], call["bias"]
    groups = call["groups"]
    # Of a transposed convolution the weight is (in, out / groups, ...).
    into, out = (0, 1) if call["transposed"] else (1, 0)
    for axis in (*weight.axes[2:], *x.axes[2:]):
        labels.protect(axis)
    if groups == 1:
        labels.contract(x, 1, weight, into)
        channels = weight.axes[out]
    else:
        grouped = labels.fresh(groups, AxisOrigin.SITE)
        labels.join(x.axes[1], grouped.repeat(len(x.axes[1]) // groups))
        own = weight.axes[0]
        labels.join(own, grouped.repeat(len(own) // groups))
        labels.protect(weight.axes[1])
        channels = grouped.repeat(call.shapes[0][1] // groups)
        labels.produced |= x.sources[1] | weight.sources[0]
    if bias is not None:
        channels = labels.join(channels, bias.axes[0])
    labels.channels += [x.axes[1], channels]
    kept = weight.sources[0 if groups > 1 else out] | (bias.sources[0] if bias else frozenset())
    positions = tuple(map(labels.fixed, call.shapes[0][2:]))
    return Labelled(
        (x.axes[0], channels, *positions),
        (x.sources[0], kept, *(frozenset() for _ in positions)),
        max(x.depth, weight.depth) + 1,
    )


def _multiply_operands(labels: Labels, call: OperationCall) -> Labelled:
    first, second = call.tensors
    return _multiply(labels, first, second)


def _multiply_and_add(labels: Labels, call: OperationCall) -> Labelled:
    added, first, second = call.tensors
    product = _multiply(labels, first, second)
    combined = broadcast(labels, [product, added], call.shapes[0])
    return replace(combined, depth=product.depth)


CONTRACTIONS: dict[Any, Rule] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot), _multiply_operands),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.addmv), _multiply_and_add),
    aten.convolution: _convolve,
}
