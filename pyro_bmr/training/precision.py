"""How precise products of float32 matrices are, by torch's own switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("highest", "high", "medium")


@contextmanager
def products(precision: str | None) -> Iterator[None]:
    """Let products be as `torch.set_float32_matmul_precision` says; None leaves it."""
    before = torch.get_float32_matmul_precision()
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Let nothing be rounded to TensorFloat32 or bfloat16, convolutions neither."""
    convolutions = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        with products("highest"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
