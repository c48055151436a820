"""One graph for every number of data, from two graphs that were recorded at two of them.

A size that Python has read (``len(x)``, ``x.shape[0]``) is a number in a recorded graph. Numbers
that differ between the two are linear in the number of data, or the graph holds at one only.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


class BatchSizeError(ValueError):
    """What a model computes depends on the number of data in a way that is not understood."""


def join(
    first: fx.GraphModule,
    second: fx.GraphModule,
    sizes: tuple[int, int],
    batched: Sequence[bool],
) -> fx.GraphModule:
    """Make one graph of two, recorded at two numbers of data, ``sizes``; the first is changed.

    Sizes are read from the placeholders that are ``batched``: whose first axis runs over the data.
    Graphs that differ in more than sizes raise a `BatchSizeError`.

    Examples
    --------
    >>> at = lambda n: fx.symbolic_trace(lambda x: torch.ops.aten.view.default(x, [2 * n]))
    >>> join(at(3), at(4), (3, 4), [True])(torch.zeros(5, 2)).shape
    torch.Size([10])
    """
    graph = first.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    sources = [n for n, b in zip(placeholders, batched, strict=True) if b and n.users]
    reader = _SizeReader(graph, placeholders[-1] if placeholders else None, sources, sizes)
    mine, others = list(graph.nodes), list(second.graph.nodes)
    if [node.target for node in mine if not _is_constant(node)] != [
        node.target for node in others if not _is_constant(node)
    ] or len(mine) != len(others):
        msg = "it runs other operations"
        raise BatchSizeError(msg)
    for node, other in zip(mine, others, strict=True):
        if node.op == "get_attr":
            _check_same(_read(first, node), _read(second, other))
            continue
        values, spec = pytree.tree_flatten((node.args, node.kwargs))
        other_values, other_spec = pytree.tree_flatten((other.args, other.kwargs))
        if spec != other_spec:
            msg = f"{node.target} takes other arguments"
            raise BatchSizeError(msg)
        read = [reader(node, a, b) for a, b in zip(values, other_values, strict=True)]
        node.args, node.kwargs = pytree.tree_unflatten(read, spec)
    first.recompile()
    return first


class _SizeReader:
    """Writes into a graph how a size follows from the number of data."""

    def __init__(
        self,
        graph: fx.Graph,
        last: fx.Node | None,
        sources: Sequence[fx.Node],
        sizes: tuple[int, int],
    ) -> None:
        self.graph, self.last, self.sources, self.sizes = graph, last, sources, sizes
        self.known: dict[tuple[int, int], fx.Node] = {}

    def __call__(self, node: fx.Node, first: Any, second: Any) -> Any:
        if isinstance(first, fx.Node) or _equal(first, second):
            return first
        if type(first) is not int or type(second) is not int:
            msg = f"{node.target} takes {first!r} at one and {second!r} at another number of data"
            raise BatchSizeError(msg)
        slope, rest = divmod(second - first, self.sizes[1] - self.sizes[0])
        if rest or not self.sources:
            msg = f"{node.target} takes sizes {first} and {second} at {self.sizes} data"
            raise BatchSizeError(msg)
        offset = first - slope * self.sizes[0]
        if (slope, offset) not in self.known:
            self.known[slope, offset] = self._write(slope, offset)
        return self.known[slope, offset]

    def _write(self, slope: int, offset: int) -> fx.Node:
        if offset:
            size = self.known.get((slope, 0)) or self._write(slope, 0)
            return self._insert(operator.add, size, offset)
        if slope != 1:
            size = self.known.get((1, 0)) or self._write(1, 0)
            return self._insert(operator.mul, size, slope)
        return self._insert(torch.ops.aten.sym_size.int, self.sources[0], 0)

    def _insert(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(target, args)
        slope_and_offset = {torch.ops.aten.sym_size.int: (1, 0), operator.mul: (args[1], 0)}
        if target in slope_and_offset:
            self.known[slope_and_offset[target]] = self.last
        return self.last


def _equal(first: Any, second: Any) -> bool:
    same = type(first) is type(second) and first == second
    # Sizes of their own data types, and numbers that are not equal to themselves.
    return bool(same) or (first != first and second != second)


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr"


def _read(module: fx.GraphModule, node: fx.Node) -> Tensor:
    return operator.attrgetter(str(node.target))(module)


def _check_same(first: Tensor, second: Tensor) -> None:
    # NaN, which stands for moments that do not exist, is the same in both.
    same = first.shape == second.shape and first.isnan().equal(second.isnan())
    if not same or not first.nan_to_num().equal(second.nan_to_num()):
        msg = f"it holds constants of shape {tuple(first.shape)} and {tuple(second.shape)}"
        raise BatchSizeError(msg)
