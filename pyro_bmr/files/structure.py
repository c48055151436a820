"""What plain data from a file must look like, said by small functions that are put together.

Each takes a value and the place where it was found, and raises a `StructureError` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pyro_bmr.display import a_or_an

Check = Callable[[Any, str], None]


class StructureError(ValueError):
    """Data that are not of the structure that was expected."""


def refuse(value: Any, where: str, expected: str) -> StructureError:
    """Say what was found at a place, and what was expected."""
    if isinstance(value, Tensor):
        got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    else:
        got = repr(value) if len(repr(value)) < _LONG else a_or_an(value)
    return StructureError(f"got {got} at {where or 'the top'}, expected {expected}")


_LONG = 60
# No dimension, count or size of anything that was saved is larger.
_MOST = 1 << 48


def text(value: Any, where: str) -> None:
    """Check a string."""
    if not isinstance(value, str):
        raise refuse(value, where, "a string")


def flag(value: Any, where: str) -> None:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise refuse(value, where, "true or false")


def number(value: Any, where: str) -> None:
    """Check a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(value, where, "a number")


def integer(value: Any, where: str) -> None:
    """Check a whole number of a sensible size."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MOST:
        raise refuse(value, where, "a whole number")


def count(value: Any, where: str) -> None:
    """Check a whole number that is not negative."""
    integer(value, where)
    if value < 0:
        raise refuse(value, where, "a number that is not negative")


def one_of(*choices: Any) -> Check:
    """Check that a value is one of these strings."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in choices:
            raise refuse(value, where, f"one of {list(choices)}")

    return check


def optional(one: Check) -> Check:
    """Check what may be None."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            one(value, where)

    return check


def sequence(one: Check, length: int | None = None) -> Check:
    """Check every item of a list."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != (len(value) if length is None else length):
            raise refuse(value, where, "a list" if length is None else f"a list of {length}")
        for i, item in enumerate(value):
            one(item, f"{where}/{i}")

    return check


def mapping(one: Check) -> Check:
    """Check every value of a mapping."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise refuse(value, where, "a mapping")
        for key, item in value.items():
            one(item, f"{where}/{key}")

    return check


def entries(required: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """Check a mapping of these keys, of which ``others`` may be absent."""
    known = {**required, **(others or {})}

    def check(value: Any, where: str) -> None:
        mapping(lambda _value, _where: None)(value, where)
        if not (required.keys() <= value.keys() <= known.keys()):
            raise refuse(sorted(value), where, f"the keys {sorted(known)}")
        for key, item in value.items():
            known[key](item, f"{where}/{key}")

    return check


def by_kind(kinds: Mapping[str, Check], key: str = "kind") -> Check:
    """Check a mapping by what it says of itself."""

    def check(value: Any, where: str) -> None:
        mapping(lambda _value, _where: None)(value, where)
        kind = value.get(key)
        one_of(*sorted(kinds))(kind, f"{where}/{key}")
        kinds[kind](value, where)

    return check


def record(kind: Any) -> Check:
    """Check the fields of a dataclass, of which those that have a default may be absent.

    Whole numbers in them count something.
    """
    hints = get_type_hints(kind)
    checks = {field.name: _of_type(hints[field.name]) for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING}
    return entries(
        {name: one for name, one in checks.items() if name in required},
        {name: one for name, one in checks.items() if name not in required},
    )


def _of_type(hint: Any) -> Check:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if is_dataclass(hint):
        return record(hint)
    inner = get_args(hint)
    if get_origin(hint) is UnionType and inner[1] is NoneType:
        return optional(_of_type(inner[0]))
    if get_origin(hint) is tuple:
        return sequence(_of_type(inner[0]))
    return mapping(_of_type(inner[1]))


_PLAIN: Mapping[Any, Check] = {str: text, bool: flag, int: count, float: number}


def tensor(value: Any, where: str) -> None:
    """Check a tensor."""
    if not isinstance(value, Tensor):
        raise refuse(value, where, "a tensor")


def floats(value: Any, where: str) -> None:
    """Check a tensor of floating-point numbers."""
    tensor(value, where)
    if not value.is_floating_point():
        raise refuse(value, where, "floating-point numbers")


def finite(value: Any, where: str) -> None:
    """Check a tensor of finite numbers."""
    floats(value, where)
    if not value.isfinite().all():
        raise refuse(value, where, "finite numbers")


def booleans(value: Any, where: str) -> None:
    """Check a tensor of booleans."""
    tensor(value, where)
    if value.dtype != torch.bool:
        raise refuse(value, where, "booleans")


def indices(value: Any, where: str) -> None:
    """Check a vector of indices in ascending order."""
    tensor(value, where)
    if value.dim() != 1 or value.dtype != torch.int64:
        raise refuse(value, where, "a vector of indices")
    if len(value) and (value[0] < 0 or not (value.diff() > 0).all()):
        raise refuse(value.tolist(), where, "indices in ascending order")


def shape(value: Any, where: str) -> None:
    """Check the shape of a tensor."""
    sequence(count)(value, where)


def check_shape(value: Tensor, expected: Any, where: str) -> None:
    """Check that a tensor has a shape."""
    if tuple(value.shape) != tuple(expected):
        raise refuse(value, where, f"the shape {tuple(expected)}")
