"""Models with their guides, by name, as users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def read_pairs(pairs: Any) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Read models and guides by name: tuples, or what has ``.model`` and ``.guide``."""
    if not isinstance(pairs, Mapping) or not pairs:
        got = "no models" if isinstance(pairs, Mapping) else f"a {type(pairs).__name__}"
        msg = f"got {got}. Expected a mapping such as {{'full': (model, guide), 'reduced': result}}"
        raise ValueError(msg) if isinstance(pairs, Mapping) else TypeError(msg)
    return {name: _read_pair(name, value) for name, value in pairs.items()}


def _read_pair(name: str, value: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if isinstance(value, tuple | list) and len(value) == 2:
        model, guide = value
    else:
        model, guide = (getattr(value, what, None) for what in ("model", "guide"))
    if not (callable(model) and callable(guide)) or isinstance(value, torch.nn.Module):
        msg = (
            f"got a {type(value).__name__} as {name!r}. Expected a tuple (model, guide), or what "
            "reduce or prune return"
        )
        raise TypeError(msg)
    return model, guide
