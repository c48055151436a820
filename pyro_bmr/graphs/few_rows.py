"""A model captured on a few rows of its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.graphs.capture import Capture, capture

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def capture_few_rows(
    model: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
) -> tuple[Call, Capture]:
    """Capture a model on a few rows of its arguments if it runs with them, or else on all.

    Returns the arguments that it ran with beside the capture.
    """
    program: Any = model
    few = take_few_rows(args, kwargs)
    if few is not None:
        with suppress(RuntimeError):
            return few, capture(program, *few, values)
    return (args, kwargs), capture(program, args, kwargs, values)


def take_few_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Take a few rows of all tensors among arguments; None if they have few, or other lengths."""
    rows = {tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim()}
    if len(rows) != 1 or max(rows) <= _FEW:
        return None
    few: Call = pytree.tree_map_only(Tensor, lambda t: t[:_FEW] if t.dim() else t, (args, kwargs))
    return few


def tensors_in(call: Any) -> list[Tensor]:
    """Find the tensors among arguments, in the order in which a `Capture` takes them."""
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


_FEW = 8
