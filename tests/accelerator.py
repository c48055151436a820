"""A pretended accelerator: tensors that say that they are on the device "meta", and have values.

What mixes devices fails as on an accelerator, and all else computes on the CPU. So the tests that
need a GPU are tried without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from pyro.ops.provenance import ProvenanceTensor
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = "meta"
aten = torch.ops.aten

# What takes tensors of the CPU beside those of an accelerator.
_MIXES = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# Not even numbers, which all that goes element by element takes.
_TAKES_NO_NUMBERS = {aten.cat.default, aten.stack.default, aten.equal.default}


class OnAccelerator(Tensor):
    """A tensor whose values are ``held`` by the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnAccelerator:
        options = {"dtype": held.dtype, "device": DEVICE, "strides": held.stride()}
        return Tensor._make_wrapper_subclass(cls, held.shape, **options)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **options: Any) -> str:
        return f"OnAccelerator({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_accelerator() -> Iterator[None]:
    """Let the device "meta" hold values, and take generators of the CPU for its own."""
    generators = mock.patch("torch.Generator", _Generator)
    tracking = mock.patch.object(ProvenanceTensor, "__new__", _track)
    with generators, tracking, _Values(), _Factories():
        yield


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, device="cpu")


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Values(TorchFunctionMode):
    """Make tensors of numbers on the CPU first: torch makes none on the device "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in {torch.tensor, torch.as_tensor} and _is_ours(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func is Tensor.new_tensor and args[0].device.type == DEVICE:
            device = kwargs.pop("device", args[0].device)
            options = {"dtype": args[0].dtype, **kwargs}
            return torch.tensor(*args[1:], **options, device="cpu").to(device)
        if func is Tensor.tolist and args[0].device.type == DEVICE:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class _Tracked(ProvenanceTensor, OnAccelerator):
    """What Pyro marks in order to see what depends on it, with the tensor itself in ``_t``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


_make_tracked = ProvenanceTensor.__new__


def _track(cls: Any, data: Tensor, provenance: frozenset[str] = frozenset(), **_: Any) -> Any:
    if not (provenance and isinstance(data, OnAccelerator)):
        return _make_tracked(cls, data, provenance)
    tracked: Any = OnAccelerator.__new__(_Tracked, data.held)
    tracked.held, tracked._t, tracked._provenance = data.held, data, provenance
    return tracked


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [one for one in tensors if isinstance(one, OnAccelerator)]
    others = [one for one in tensors if not isinstance(one, OnAccelerator)]
    if ours and func not in _MIXES:
        too_large = 0 if func in _TAKES_NO_NUMBERS else 1
        if any(one.dim() >= too_large for one in others):
            msg = f"{func}: expected all tensors to be on the same device, got {DEVICE} and cpu"
            raise RuntimeError(msg)
    there = bool(ours)
    if func is aten.index.Tensor:
        there = isinstance(args[0], OnAccelerator)
        if ours and not there:
            msg = "indices should be on the CPU or on the device of the tensor"
            raise RuntimeError(msg)
    if kwargs.get("device") is not None:
        there = _is_ours(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(OnAccelerator, lambda t: t.held, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if not there:
        return result
    result = tree_map_only(Tensor, OnAccelerator, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result
