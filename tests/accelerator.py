"""A pretended accelerator: tensors that say that they are on the device "meta", and have values.

What mixes devices fails as on an accelerator, and all else computes on the CPU: what tests of a GPU
are for is seen without one. Only captured graphs (units, compaction, export) know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = "meta"
aten = torch.ops.aten

# What takes tensors of the CPU beside those of an accelerator.
_MIXES = {
    aten.copy_.default,
    aten._to_copy.default,
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
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, **options)
        tensor.held = held
        return tensor

    def new_tensor(self, data: Any, **options: Any) -> Any:
        """Make it on the CPU first, as `_Values` does, also where torch leaves modes out."""
        device, options = options.pop("device", DEVICE), {"dtype": self.dtype, **options}
        return torch.tensor(data, **options, device="cpu").to(device)

    def as_subclass(self, cls: Any) -> Any:
        """Let what marks tensors by a class of its own, as Pyro does, mark these."""
        with torch._C.DisableTorchFunctionSubclass():
            tensor = aten.alias.default(self)
        tensor.__class__ = OnAccelerator if cls is Tensor else _both(cls)
        return tensor

    def __repr__(self, **options: Any) -> str:
        return f"OnAccelerator({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@cache
def _both(cls: type) -> type:
    return type(cls.__name__, (cls, OnAccelerator), {})


@contextmanager
def pretended_accelerator() -> Iterator[None]:
    """Let the device "meta" hold values, and take generators of the CPU for its own."""
    modules = "pyro_bmr.programs.data", "pyro_bmr.moments.names"
    of_data, of_moments = (mock.patch(f"{module}.check_tensor") for module in modules)
    with of_data, of_moments, mock.patch("torch.Generator", _Generator), _Values(), _Factories():
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
        if func == Tensor.data.__set__ and isinstance(args[1], OnAccelerator):
            args[0].held = args[1].held
        if func is Tensor.tolist and args[0].device.type == DEVICE:
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    ours, others = [], []
    for leaf in _leaves((*args, *kwargs.values())):
        (ours if isinstance(leaf, OnAccelerator) else others).append(leaf)
    there = bool(ours)
    if ours and others:
        _check(func, args, others)
        there = func is not aten.index.Tensor or isinstance(args[0], OnAccelerator)
    if kwargs.get("device") is not None:
        there = _is_ours(kwargs["device"])
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain = {name: _to_cpu(value) for name, value in kwargs.items()}
    result = func(*map(_to_cpu, args), **plain)
    if not there:
        return result
    result = _to_accelerator(result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result


def _check(func: Any, args: Any, others: list[Tensor]) -> None:
    """Refuse what mixes devices."""
    allowed = func in _MIXES
    if func is aten.index.Tensor:
        # Numbers of elements may be on the CPU, and need not be on the accelerator.
        allowed = isinstance(args[0], OnAccelerator)
    too_large = 0 if func in _TAKES_NO_NUMBERS else 1
    if not allowed and any(one.dim() >= too_large for one in others):
        msg = f"{func}: expected all tensors to be on the same device, got {DEVICE} and cpu"
        raise RuntimeError(msg)


def _leaves(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _leaves(value)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_to_cpu, value))
    return value.held if isinstance(value, OnAccelerator) else value


def _to_accelerator(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_to_accelerator, value))
    return OnAccelerator(value) if isinstance(value, Tensor) else value
