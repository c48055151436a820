"""Guides that compute a posterior from what they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_bmr.guides.guide_reader import GuideReader
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.statements import Statement

Run = Callable[[Mapping[str, Tensor], Origin], GuideReader]


def find_given(first: GuideReader, run: Run, origin: Origin) -> set[str]:
    """Find sites whose posterior changes with the values of the arguments of the guide.

    Seen from outside: gradients do not pass `torch.no_grad`, whole numbers and NumPy.
    """
    values = {name: leaf.detach() for name, leaf in first.leaves.items()}
    found: set[str] = set()
    for change in (_turn_over, _shrink):
        args, kwargs = tree_map(change, (origin.args, dict(origin.kwargs)))
        # Arguments that the guide cannot take say nothing.
        with suppress(RuntimeError):
            found |= _find_changed(first, run(values, replace(origin, args=args, kwargs=kwargs)))
    # What changes from run to run says nothing of the arguments.
    return found - _find_changed(first, run(values, origin)) if found else found


def _turn_over(value: Any) -> Any:
    """Put rows in another order: each is still one that may be."""
    if isinstance(value, np.ndarray):
        return value[::-1].copy() if value.ndim else value
    return value.flip(0) if isinstance(value, Tensor) and value.dim() else value


def _shrink(value: Any) -> Any:
    """Bring numbers closer to zero, each by another factor, so that no mean or ratio stays."""
    if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
        return _shrink(torch.from_numpy(value.copy())).numpy()
    if isinstance(value, Tensor) and value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        factors = 1 - 0.2 * torch.rand(value.shape, generator=generator)
        return value.detach() * factors.to(value)
    return 0.9 * value if isinstance(value, float) else value


def _find_changed(first: GuideReader, other: GuideReader) -> set[str]:
    now = other.statements
    return {n for n, one in first.statements.items() if not (n in now and _is_same(one, now[n]))}


def _is_same(one: Statement, other: Statement) -> bool:
    tensors = zip((one.loc, *one.spread), (other.loc, *other.spread), strict=False)
    return all(torch.equal(first, second) for first, second in tensors)
