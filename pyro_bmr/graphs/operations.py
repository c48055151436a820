"""What an operation of a graph is: its name, its arguments, what it writes to, whether it draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx


def name_operation(node: fx.Node) -> str:
    """Name an operation as in ``torch.ops.aten``, the same whether in place or not."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = getattr(target if packet is None else packet, "__name__", str(target))
    return name.removesuffix("_") if is_in_place(target) else name


def read_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operation by name, also defaults; none if it has no schema."""
    return {argument.name: value for argument, value in _arguments(node)}


def find_aliases(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory the result may share, or that are written to."""
    return [value for argument, value in _tensors(node) if argument.alias_info is not None]


def find_written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operation writes to."""
    return [value for argument, value in _tensors(node) if _is_written(argument)]


def is_in_place(target: Any) -> bool:
    """Tell whether an operation writes to its first argument."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(map(_is_written, schema.arguments[:1]))


def is_random(target: Any) -> bool:
    """Tell whether an operation draws random numbers, or would if its options say so."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Each argument of an operation: what its schema says of it, and what it is."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    for argument in schema.arguments:
        if argument.name in given or argument.has_default_value():
            yield argument, given.get(argument.name, argument.default_value)


def _tensors(node: fx.Node) -> Iterator[tuple[Any, fx.Node]]:
    for argument, value in _arguments(node):
        values = value if isinstance(value, list | tuple) else (value,)
        yield from ((argument, one) for one in values if isinstance(one, fx.Node))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
