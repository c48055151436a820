"""Walk over many weights with little memory: compiled where there are many, in cache where few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.display import warn

# From so many elements on, compiling (seconds, once per process) is worth it.
_COMPILE_FROM = 1 << 20
# What fits into the cache of a CPU; elsewhere a launch costs more than its intermediate results.
_ON_CPU, _ELSEWHERE = (1 << 16, 1 << 22), (1 << 22, 1 << 30)


def sweep(kernel: Callable[..., Any], *tensors: Tensor, context: Any = None) -> list[Any]:
    """Apply a kernel to broadcast tensors, a chunk at a time; return what it returns for each.

    The kernel, a module-level function of ``context`` and a chunk of each tensor, may write to the
    chunks. Intermediate results are as small as a chunk. Tensors of a million elements and more go
    through `torch.compile`, on an accelerator as a whole, since nothing is stored in between;
    without a C++ compiler they do not, and a warning says so once.
    """
    device = tensors[0].device.type
    size, compiled_size = _ON_CPU if device == "cpu" else _ELSEWHERE
    many = max(tensor.numel() for tensor in tensors) >= _COMPILE_FROM
    if many and _can_compile(device):
        kernel, size = _compiled(kernel), compiled_size
    return [kernel(context, *chunk) for chunk in _chunks(size, *tensors)]


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    shape = max((t.shape for t in tensors), key=torch.Size.numel)
    if all(t.numel() == 1 or (t.shape == shape and t.is_contiguous()) for t in tensors):
        shape = torch.Size([shape.numel()])
        tensors = tuple(t.reshape(-1) for t in tensors)
    else:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors)) or torch.Size([1])
    rows = max(1, size // max(1, shape[1:].numel()))
    yield from zip(*(t.expand(shape).split(rows) for t in tensors), strict=True)


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)


@cache
def _can_compile(device: str) -> bool:
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:
        warn(
            f"torch.compile does not work here ({type(error).__name__}), so large posteriors are "
            "scored without it, in about twice the time. A C++ compiler such as g++ is what it "
            "mostly lacks"
        )
        return False
    return True
