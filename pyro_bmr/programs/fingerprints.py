"""What tells one run from another, also in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from types import CodeType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor

_RATES = 33
_AT_ONCE = 1 << 16
# Shifts and multipliers after which each bit depends on all: Steele et al. 2014, "Fast splittable
# pseudorandom number generators", SplitMix64.
_MIXING = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
    (np.uint64(31), np.uint64(1)),
)


def fingerprint_run(guide: Any, data: Iterable[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Tell a run from others by its guide's type, its data and its options, as they were read."""
    told = {name: fingerprint(v) for name, v in options.items() if name != "lr"}
    told |= {"guide": type(guide).__name__, "data": list(map(fingerprint, data))}
    return {**told, "lr": _fingerprint_rate(options["lr"])}


def fingerprint_rows(tensors: Iterable[Tensor]) -> int:
    """Tell rows from others, in any order: a sum of 64 bits, that adds up over parts of them."""
    parts = [one.detach().cpu() for one in tensors]
    total = 0
    for chunk in zip(*(one.split(_AT_ONCE) for one in parts), strict=True):
        rows = [t.reshape(len(t), -1).contiguous().view(torch.uint8).numpy() for t in chunk]
        row_bytes = np.concatenate(rows, axis=1)
        padded = np.pad(row_bytes, ((0, 0), (0, -row_bytes.shape[1] % 8)))
        mixed = np.ones(len(padded), dtype=np.uint64)
        for words in padded.view(np.uint64).T:
            mixed ^= words
            for shift, multiplier in _MIXING:
                mixed = (mixed ^ (mixed >> shift)) * multiplier
        total += int(mixed.sum(dtype=np.uint64))
    return total % 2**64


def _fingerprint_rate(lr: Callable[[float], float]) -> float | list[Any]:
    """Tell one learning rate from another by its values over a training."""
    rates = [lr(i / _RATES) for i in range(_RATES)]
    whole = sha256(str(rates).encode()).hexdigest()
    return [rates[0], rates[-1], whole] if len(set(rates)) > 1 else rates[0]


def fingerprint(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return something short, of plain types, that tells one option from another.

    Tensors by their content, functions by what they do and captured, other objects by what they
    hold; ``above`` are those that this one is a part of.
    """
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [*value.shape, sha256(content).hexdigest()]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if isinstance(value, complex | range | torch.dtype | torch.device):
        return str(value)
    if id(value) in above:
        return "itself"

    def each(parts: Iterable[Any]) -> list[Any]:
        return [fingerprint(one, (*above, id(value))) for one in parts]

    if isinstance(value, list | tuple):
        return each(value)
    if isinstance(value, set | frozenset):
        return sorted(each(value), key=str)
    if isinstance(value, Mapping):
        return each((str(key), one) for key, one in value.items())
    if isinstance(value, CodeType):
        return each((value.co_code, value.co_consts, value.co_names))
    if isinstance(value, MethodType):
        return each((value.__func__, value.__self__))
    if isinstance(value, partial):
        return each((value.func, value.args, value.keywords))
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, type | ModuleType):
        return [getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__)]
    if hasattr(value, "__code__"):
        captured = [_content(cell) for cell in value.__closure__ or ()]
        return [name, *each((value.__code__, value.__defaults__, value.__kwdefaults__, captured))]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return each([array.tolist()] if array.dtype.hasobject else [array.shape, array.tobytes()])
    # What Pyro counts for itself, as a loss runs, is no option.
    counted = isinstance(value, ELBO)
    held = {
        key: one
        for key, one in getattr(value, "__dict__", {}).items()
        if not (counted and (key.startswith("_") or key == "max_plate_nesting"))
    }
    return [name, *each(held.items())]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # of a name that has no value yet
