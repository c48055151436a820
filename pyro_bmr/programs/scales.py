"""The scale of a sample statement, by which its log density is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def read_scale(node: Mapping[str, Any]) -> Tensor:
    """Return the scale, a number or a tensor, on the device of the statement's value."""
    value = node["value"]
    device = value.device if isinstance(value, Tensor) else "cpu"
    return torch.as_tensor(node["scale"], device=device)
