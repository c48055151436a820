"""Operations of a graph as its rules see them, and the rule of those that act elementwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from pyro_bmr.units.labelled import AxisOrigin, Labelled
from pyro_bmr.units.labels import Labels

Result: TypeAlias = "Labelled | tuple[Labelled, ...]"

Rule: TypeAlias = "Callable[[Labels, OperationCall], Result]"
"""Says the labels of what an operation returns, and joins or protects those that it gets."""

aten: Any = torch.ops.aten

CONSTANT_ALONG = "a constant of the program lies along its axis"
"""Why an axis is protected that meets numbers which stand in the program itself."""


@dataclass(frozen=True)
class OperationCall:
    """One operation of a graph, by its name (``aten.mm``) and that of its node.

    Arguments go by their names in the schema, and tensors among them are `Labelled`; shapes are
    those of the tensors that it returns.
    """

    name: str
    operation: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def tensors(self) -> list[Labelled]:
        """The tensors among the arguments."""
        return list(_find_labelled(self.arguments.values()))


def broadcast(labels: Labels, operands: Iterable[Labelled], shape: tuple[int, ...]) -> Labelled:
    """Combine tensors element by element: axes that have the size of the result are joined."""
    operands = list(operands)
    axes, sources = [], []
    for position, size in enumerate(shape, -len(shape)):
        axis, found = None, frozenset[int]()
        for operand in operands:
            if len(operand.axes) < -position:
                continue
            other = operand.axes[position]
            if len(other) != size:
                labels.protect(other)
                continue
            axis = other if axis is None else labels.join(axis, other)
            found |= operand.sources[position]
        axes.append(labels.fresh(size, AxisOrigin.CREATED) if axis is None else axis)
        sources.append(found)
    depth = max((operand.depth for operand in operands), default=0.0)
    return Labelled(tuple(axes), tuple(sources), depth)


def combine(labels: Labels, call: OperationCall) -> Result:
    """Combine all tensors among the arguments element by element."""
    results = tuple(broadcast(labels, call.tensors, shape) for shape in call.shapes)
    return results[0] if len(results) == 1 else results


def create(labels: Labels, call: OperationCall) -> Result:
    """Make tensors from nothing, with fresh labels."""
    results = tuple(labels.create(shape) for shape in call.shapes)
    return results[0] if len(results) == 1 else results


def create_sequence(labels: Labels, call: OperationCall) -> Result:
    """Make tensors whose elements depend on where they are: `arange`, `eye`."""
    made = create(labels, call)
    for x in made if isinstance(made, tuple) else (made,):
        for axis in x.axes:
            labels.protect(axis, CONSTANT_ALONG)
    return made


def protect_all(labels: Labels, call: OperationCall) -> Result:
    """Protect all that an operation touches, because it has no rule."""
    reason = f"no rule for {call.operation}"
    for axis in (axis for tensor in call.tensors for axis in tensor.axes):
        labels.protect(axis, reason, call.operation)
    depth = max((tensor.depth for tensor in call.tensors), default=0.0)
    results = tuple(replace(labels.create(shape), depth=depth) for shape in call.shapes)
    for axis in (axis for result in results for axis in result.axes):
        labels.protect(axis, reason, call.operation)
    return results[0] if len(results) == 1 else results


def _keep(_labels: Labels, call: OperationCall) -> Labelled:
    """Return the first tensor as it is."""
    return call.tensors[0]


def _combine_halves(labels: Labels, call: OperationCall) -> Labelled:
    """Combine the two halves of an axis: `torch.nn.functional.glu`."""
    x: Labelled = call["self"]
    first, second = np.split(x.axes[call["dim"]], 2)
    return x.put(call["dim"], labels.join(first, second))


ELEMENTWISE: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.clone,
            aten.detach,
            aten.alias,
            aten._to_copy,
            aten.lift_fresh_copy,
            aten.fill_,
            aten.fill,
            aten.zero_,
            aten.zeros_like,
            aten.ones_like,
            aten.full_like,
            aten.empty_like,
            aten.rand_like,
            aten.randn_like,
            aten.bernoulli_,
            aten.normal_,
            aten.uniform_,
            aten.exponential_,
        ),
        _keep,
    ),
    **dict.fromkeys(
        (
            aten.copy,
            aten.copy_,
            aten.masked_fill,
            aten.masked_fill_,
            aten.native_dropout,
            aten._prelu_kernel,
            aten.log_sigmoid_forward,
            aten.bernoulli,
            aten.normal,
            aten.poisson,
            aten._standard_gamma,
            aten.rsub,
            aten.abs_,
            aten.mish_,
            aten.hardswish,
            aten.hardswish_,
            aten.leaky_relu,
            aten.leaky_relu_,
        ),
        combine,
    ),
    aten.glu: _combine_halves,
    **dict.fromkeys(
        (
            aten.zeros,
            aten.ones,
            aten.full,
            aten.empty,
            aten.rand,
            aten.randn,
            aten.new_zeros,
            aten.new_ones,
            aten.new_full,
            aten.new_empty,
        ),
        create,
    ),
}


def _find_labelled(values: Iterable[Any]) -> Iterable[Labelled]:
    for value in values:
        if isinstance(value, Labelled):
            yield value
        elif isinstance(value, list | tuple):
            yield from _find_labelled(value)
