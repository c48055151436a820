"""How far two outputs of the same network are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def relative_error(expected: Any, found: Any) -> float:
    """Return the largest difference by the largest size in ``expected``; inf for other shapes."""
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    errors = [_error(one, other) for one, other in pairs if isinstance(one, Tensor)]
    return max(errors, default=0.0)


def tolerance(expected: Any) -> float:
    """Return the relative error that the order of sums may make in the least precise dtype."""
    leaves = pytree.tree_leaves(expected)
    floats = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    return max((torch.finfo(t.dtype).eps ** 0.6 for t in floats), default=0.0)


def _error(one: Tensor, other: Tensor) -> float:
    """Return the error of one tensor; inf also where a value is finite in one output only."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return torch.inf
    finite = one.isfinite()
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return torch.inf
    one, other = one[finite], other[finite]
    if not one.numel():
        return 0.0
    scale = one.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((one - other).abs().max() / scale)
