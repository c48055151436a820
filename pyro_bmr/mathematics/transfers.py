"""What the host needs to know of many tensors, in one transfer: each makes it wait for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_numbers(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the numbers that tensors without axes hold; one transfer per device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    numbers: dict[int, Any] = {}
    for places in alike.values():
        values = torch.stack([tensors[i] for i in places]).tolist()
        numbers |= dict(zip(places, values, strict=True))
    return [numbers[i] for i in range(len(tensors))]


def find_extremes(tensors: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Return the lowest and the highest number of each tensor; NaN if there is one in it."""
    ends = to_numbers([end for tensor in tensors for end in torch.aminmax(tensor)])
    return list(zip(ends[::2], ends[1::2], strict=True))


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors of one element each to the CPU, in one transfer per device and dtype."""
    numbers = to_numbers([tensor.reshape(()) for tensor in tensors])
    return [
        torch.tensor(number, dtype=tensor.dtype, device="cpu").reshape(tensor.shape)
        for number, tensor in zip(numbers, tensors, strict=True)
    ]
