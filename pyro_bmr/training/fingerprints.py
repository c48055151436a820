"""What tells one run from another, also in another process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor


def fingerprint_run(guide: Any, data: Iterable[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Tell a run from others by its guide's type, its data and its options."""
    described = {name: fingerprint(v) for name, v in options.items() if name not in _FREE}
    return {"guide": type(guide).__name__, "data": list(map(fingerprint, data)), **described}


# Options that change the result by no more than other random numbers would.
_FREE = {"compile", "progress"}


def fingerprint(value: Any) -> Any:
    """Return something short, of plain types, that tells one option from another.

    Tensors by their content, functions by their name, their numbers and what they captured.
    """
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [*value.shape, sha256(content).hexdigest()]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [fingerprint(one) for one in value]
    if isinstance(value, Mapping):
        return [[str(key), fingerprint(one)] for key, one in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *map(fingerprint, vars(value).values())]
    captured = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    constants = getattr(getattr(value, "__code__", None), "co_consts", ())
    numbers = [constant for constant in constants if isinstance(constant, int | float)]
    name = getattr(value, "__qualname__", type(value).__name__)
    return [name, *numbers, *map(fingerprint, captured)]
