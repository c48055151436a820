"""Distributions of some elements only."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.distributions.constraints import Constraint

from pyro_bmr.display import a_or_an
from pyro_bmr.programs.distributions import PrunedDistribution
from pyro_bmr.programs.sites import Indices
from pyro_bmr.programs.switching import SwitchedDistribution


def cut_distribution(fn: Any, full: torch.Size, kept: Indices) -> Any:
    """Leave some elements of a distribution, inside whatever wraps it.

    ``full`` is the shape that its site had; batch dimensions may stand to the left. An axis of
    another size, because the parents of the site were cut, stays as it is. A ValueError says that
    there are too few dimensions, or that elements along an axis that is cut are not independent.
    """
    shape = fn.shape()
    todo: dict[int, Tensor] = {}
    for dim, (size, index) in enumerate(zip(reversed(full), reversed(kept), strict=True), 1):
        if index is None:
            continue
        if dim > len(shape):
            msg = (
                f"got {a_or_an(fn)} of shape {tuple(shape)}. Expected {tuple(full)}, or "
                "what is left of it"
            )
            raise ValueError(msg)
        if shape[-dim] == size:
            todo[-dim] = index
    return _cut(fn, todo) if todo else fn


def _cut(fn: Any, todo: dict[int, Tensor]) -> Any:
    """Cut dimensions, counted from the right of ``fn.shape()``."""
    if isinstance(fn, Independent):
        return Independent(_cut(fn.base_dist, todo), fn.reinterpreted_batch_ndims)
    todo = {dim + fn.event_dim: index for dim, index in todo.items()}
    if max(todo) >= 0:
        msg = (
            f"elements of {a_or_an(fn)} cannot be cut one by one, because they are not "
            "independent. Expected univariate elements, such as Normal(...).to_event(n)"
        )
        raise ValueError(msg)
    shape = list(fn.batch_shape)
    for dim, index in todo.items():
        shape[dim] = len(index)
    if isinstance(fn, MaskedDistribution):
        mask = fn._mask if isinstance(fn._mask, bool) else _cut_tensor(fn._mask, todo)
        base = fn.base_dist.expand(fn.batch_shape)
        return MaskedDistribution(_cut_core(base, todo), mask)
    if isinstance(fn, ExpandedDistribution):
        base = fn.base_dist
        sizes = base.batch_shape
        own = {dim: i for dim, i in todo.items() if -dim <= len(sizes) and sizes[dim] != 1}
        base = _cut_core(base, own) if own else base
        return ExpandedDistribution(base, torch.Size(shape))
    return _cut_core(fn, todo)


def _cut_core(fn: Any, todo: dict[int, Tensor]) -> Any:
    """Cut batch dimensions, counted from the right of ``fn.batch_shape``."""
    if isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        return _cut(fn, {dim - fn.event_dim: index for dim, index in todo.items()})
    if isinstance(fn, PrunedDistribution):
        center = fn.center and fn.center.map(lambda t: _cut_tensor(t, todo))
        cut, mask = _cut_core(fn.base_dist, todo), _cut_tensor(fn.mask, todo)
        return PrunedDistribution(cut, mask, center)
    if isinstance(fn, SwitchedDistribution):
        first, other = (_cut_core(part, todo) for part in (fn.base_dist, fn.other))
        return SwitchedDistribution(first, other, _cut_tensor(fn.mask, todo))
    if not fn.arg_constraints and _is_elementwise(fn):
        base = fn.base_dist.expand(fn.batch_shape)
        return type(fn)(_cut_core(base, todo), fn.transforms)
    # Of several ways to say the same (logits and probs), the instance holds the one that was said.
    names = [name for name in fn.arg_constraints if name in vars(fn)]
    names = names or [n for n in fn.arg_constraints if n in signature(type(fn).__init__).parameters]
    values = {name: _parameter(fn, name, fn.arg_constraints[name], todo) for name in names}
    try:
        smaller = type(fn)(**values, validate_args=False)
    except TypeError as error:
        msg = (
            f"cannot make a smaller {type(fn).__name__} from its parameters {list(values)}. "
            "Expected a distribution that its constructor makes from its arg_constraints"
        )
        raise ValueError(msg) from error
    # Its parameters are valid if they were before; values are checked as before.
    smaller._validate_args = fn._validate_args
    return smaller


def _parameter(fn: Any, name: str, constraint: Constraint, todo: dict[int, Tensor]) -> Any:
    value = getattr(fn, name)
    if not isinstance(value, Tensor):
        return value
    try:
        event_dim = constraint.event_dim
    except NotImplementedError:  # of a dependent constraint that does not say
        event_dim = fn.event_dim
    event_shape = value.shape[value.dim() - event_dim :]
    value = value.expand(fn.batch_shape + event_shape)
    return _cut_tensor(value, {dim - event_dim: index for dim, index in todo.items()})


def _cut_tensor(value: Tensor, todo: dict[int, Tensor]) -> Tensor:
    for dim, index in todo.items():
        if -dim > value.dim() or value.shape[dim] == 1:
            continue
        # What was expanded is not copied.
        if value.stride(dim) == 0:
            value = value.narrow(dim, 0, len(index))
        else:
            value = value.index_select(dim, index)
    return value


def _is_elementwise(fn: Any) -> bool:
    if not isinstance(fn, TransformedDistribution):
        return False
    tensors = (v for t in fn.transforms for v in vars(t).values() if isinstance(v, Tensor))
    return all(t.domain.event_dim == 0 == t.codomain.event_dim for t in fn.transforms) and not any(
        v.dim() for v in tensors
    )
