"""Models with their guides, as users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Pair = tuple[Callable[..., Any], Callable[..., Any]]

_EXPECTED = (
    "Expected a pair: what reduce or prune returned, or (model, guide); or a mapping from names to "
    "pairs, such as {'full': (model, guide), 'reduced': result}"
)


def read_pairs(pairs: Any) -> dict[str, Pair]:
    """Read pairs by name; one alone is called ``"model"``."""
    if isinstance(pairs, Mapping) and not pairs:
        msg = f"got no models. {_EXPECTED}"
        raise ValueError(msg)
    named = pairs if isinstance(pairs, Mapping) else {"model": pairs}
    return {name: read_pair(value, f" as {name!r}") for name, value in named.items()}


def read_pair(value: Any, place: str = "") -> Pair:
    """Read a model and its guide: a tuple of both, or what has ``.model`` and ``.guide``."""
    if isinstance(value, tuple | list) and len(value) == 2:
        model, guide = value
    else:
        model, guide = (getattr(value, what, None) for what in ("model", "guide"))
    if not (callable(model) and callable(guide)) or isinstance(value, torch.nn.Module):
        msg = f"got a {type(value).__name__}{place}. {_EXPECTED}"
        raise TypeError(msg)
    return model, guide
