"""Options of the right kind: what every public function checks before it does anything.

Each check has the name of an option and what was passed for it. A number, a word or a switch that
makes no sense is a ValueError, an object of another kind a TypeError; either says what came in and
what was expected. Whole numbers and numbers of numpy are as good as those of Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from pyro_bmr.display import a_or_an

_MOST = 2**63 - 1
_MOST_SEED = 2**32 - 1
_LONGEST = 60

T = TypeVar("T")


def show(value: object) -> str:
    """Write what was passed, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and not isinstance(value, np.generic):
        return f"{a_or_an(value)} of shape {tuple(shape)}"
    text = repr(value)
    plain = value is None or isinstance(value, Real | str | bytes | list | tuple | dict | set)
    fits = len(text) <= _LONGEST and "\n" not in text
    return text if fits and (plain or not text.startswith("<")) else a_or_an(value)


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raise the ValueError for an option that makes no sense."""
    msg = f"got {name}={show(value)}. Expected {expected}"
    raise ValueError(msg)


def refuse_kind(name: str, value: object, expected: str) -> NoReturn:
    """Raise the TypeError for an option of another kind."""
    msg = f"got {name}={show(value)}. Expected {expected}"
    raise TypeError(msg)


def read_count(name: str, value: Any, least: int = 1, most: int = _MOST, expected: str = "") -> int:
    """Read a whole number; ``expected`` says of what."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and least <= value <= most):
        span = f"{least} or more" if most == _MOST else f"between {least} and {most}"
        refuse(name, value, expected or f"a whole number, {span}")
    return int(value)


def read_number(
    name: str, value: Any, fits: Callable[[float], bool], expected: str = "a number"
) -> float:
    """Read a number, of which ``fits`` tells whether it makes sense; NaN never does."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or math.isnan(value) or not fits(number := _as_float(value)):
        refuse(name, value, expected)
    return number


def read_positive(name: str, value: Any, expected: str = "a positive number") -> float:
    """Read a finite number above zero."""
    return read_number(name, value, lambda number: 0 < number < math.inf, expected)


def read_seed(value: Any) -> int:
    """Read a seed that all generators take."""
    return read_count("seed", value, 0, _MOST_SEED, "a whole number from 0 to 2**32 - 1")


def read_optional(value: T | None, read: Callable[..., Any], name: str, **limits: Any) -> Any:
    """Read an option that may be None."""
    return None if value is None else read(name, value, **limits)


def check_switch(name: str, value: Any) -> None:
    """Raise a ValueError if something is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        refuse(name, value, "True or False")


def check_choice(name: str, value: Any, choices: Iterable[str], also: str = "") -> None:
    """Raise a ValueError if something is none of some words; ``also`` says what else may be."""
    *words, last = choices
    if not (isinstance(value, str) and value in {*words, last}):
        listed = ", ".join(map(repr, words))
        refuse(name, value, f"{listed}, {last!r}, {also}" if also else f"{listed} or {last!r}")


def check_function(name: str, value: Any, expected: str) -> None:
    """Raise a TypeError if something cannot be called, or is a class."""
    if not callable(value) or isinstance(value, type):
        refuse_kind(name, value, expected)


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError if something is not of a kind."""
    if not isinstance(value, kind):
        refuse_kind(name, value, expected)


def check_path(value: Any, name: str = "path") -> None:
    """Raise a TypeError if something is no path, a ValueError if it is an empty one."""
    check_kind(name, value, (str, PathLike), "the path of a file")
    if not str(value):
        refuse(name, value, "the path of a file")


def read_device(value: Any) -> torch.device:
    """Read where tensors are."""
    try:
        return torch.device(value)
    except Exception:
        refuse_kind("device", value, "a device that there is, such as 'cpu' or 'cuda'")


def read_names(name: str, value: Any, expected: str = "names of sites") -> tuple[str, ...] | None:
    """Read names, given as one or as any iterable; None stays None."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    names = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(one, str) for one in names):
        refuse_kind(name, value, f"{expected}, such as ['w', 'b']")
    return names


def read_mapping(name: str, value: Any, expected: str) -> dict[str, Any]:
    """Read a mapping from names; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        refuse_kind(name, value, expected)
    return dict(value)


def read_keywords(value: Any) -> dict[str, Any]:
    """Read the keyword arguments of a model."""
    expected = "a mapping from names of the model's keywords, such as {'offset': offset}"
    return read_mapping("kwargs", value, expected)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
