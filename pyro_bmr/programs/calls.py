"""How a model is called, at any number of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.programs.wrappers import read_signature


def read_call(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Call:
    """Find the tensors among the arguments of a model, with the names that it gives to them."""
    kwargs = dict(kwargs or {})
    paths, spec = pytree.tree_flatten_with_path((tuple(args), kwargs))
    parameters = _parameter_names(model, args)
    names = [_name(path, parameters) for path, leaf in paths if isinstance(leaf, Tensor)]
    unique = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    return Call(tuple(leaf for _, leaf in paths), spec, tuple(unique))


@dataclass(frozen=True)
class Call:
    """The arguments of a model, of which the tensors are inputs.

    ``leaves``: all of them, out of their containers, ``spec``; ``names``: one per tensor.
    """

    leaves: tuple[Any, ...]
    spec: Any
    names: tuple[str, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs as they were given."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def size(self) -> int | None:
        """How many data there are: the first axis of the first tensor; None without one."""
        return next((len(t) for t in self.tensors if t.dim() and len(t)), None)

    @property
    def batched(self) -> list[bool]:
        """Per input, whether its first axis runs over the data."""
        return [t.dim() > 0 and len(t) == self.size for t in self.tensors]

    def inputs(self, size: int) -> list[Tensor]:
        """Return the inputs at this number of data, cut off or repeated."""
        return [
            t[torch.arange(size, device=t.device) % len(t)] if batched else t
            for t, batched in zip(self.tensors, self.batched, strict=True)
        ]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put inputs in the place of the tensors; return ``args`` and ``kwargs``."""
        ahead = iter(inputs)
        leaves = [next(ahead) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


def check_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    expected: str = "all of its data, as when it was trained",
) -> None:
    """Raise a TypeError if a model cannot be called with these arguments."""
    try:
        read_signature(model).bind(*args, **kwargs)
    except TypeError as error:
        msg = (
            f"got {len(args)} arguments and keywords {list(kwargs)} for the model: {error}. "
            f"Expected {expected}; keywords of the model as in kwargs={{'offset': offset}}"
        )
        raise TypeError(msg) from error


def without_inference_mode(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the data that were made in inference mode, which cannot be differentiated."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor

    return pytree.tree_map_only(Tensor, copied, (args, dict(kwargs)))


def _parameter_names(model: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    try:
        return list(read_signature(model).bind_partial(*args).arguments)
    except (TypeError, ValueError):
        return []


def _name(path: tuple[Any, ...], parameters: list[str]) -> str:
    # Of a flattened (args, kwargs): 0 or 1, then an index or a name, then what is inside.
    if path[0].idx == 1:
        name = str(path[1].key)
    else:
        name = dict(enumerate(parameters)).get(path[1].idx, "input")
    return name if name.isidentifier() else "input"
