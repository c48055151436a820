"""Writing values into the tensors of a program."""

from __future__ import annotations

import torch
from torch import Tensor


def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor a value of its shape; elements that share memory are written once."""
    if tensor.layout == torch.strided:
        own = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
        tensor, value = tensor.data[own], value[own]
    tensor.data.copy_(value)
