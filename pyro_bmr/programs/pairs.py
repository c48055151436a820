"""Models with their guides, as users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Pair = tuple[Callable[..., Any], Callable[..., Any]]

_PAIR = "Expected a pair: what reduce or prune returned, or (model, guide)"
_PAIRS = (
    f"{_PAIR}; or a mapping from names to pairs, such as "
    "{'full': (model, guide), 'reduced': result}"
)


def read_pairs(pairs: Any) -> dict[str, Pair]:
    """Read pairs by name; one alone is called ``"model"``."""
    if isinstance(pairs, Mapping) and not pairs:
        msg = f"got no models. {_PAIRS}"
        raise ValueError(msg)
    if not isinstance(pairs, Mapping):
        return {"model": read_pair(pairs, expected=_PAIRS)}
    return {name: read_pair(value, f" as {name!r}", _PAIRS) for name, value in pairs.items()}


def read_pair(value: Any, place: str = "", expected: str = _PAIR) -> Pair:
    """Read a model and its guide: a tuple of both, or what has ``.model`` and ``.guide``."""
    if isinstance(value, tuple | list) and len(value) == 2:
        model, guide = value
    else:
        model, guide = (getattr(value, what, None) for what in ("model", "guide"))
    if not (callable(model) and callable(guide)) or isinstance(value, torch.nn.Module):
        msg = f"got a {type(value).__name__}{place}. {expected}"
        raise TypeError(msg)
    return model, guide


def check_programs(verb: str, model: Any, guide: Any) -> None:
    """Raise a TypeError if what a verb was given are no programs, but a result and data, say."""
    if not (callable(model) and callable(guide)):
        msg = (
            f"{verb} got a {type(model).__name__} and a {type(guide).__name__}. Expected a model "
            f"and its guide, as in {verb}(model, guide, x, y), or of a result, "
            f"{verb}(result.model, result.guide, x, y)"
        )
        raise TypeError(msg)
