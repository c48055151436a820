"""A tensor of independent Gaussian elements, and the table of the torch functions that it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import resolve_name
from typing_extensions import override


def gaussian(loc: Tensor, variance: Tensor) -> GaussianTensor:
    """Make a tensor of independent Gaussian elements; a variance of zero is a constant."""
    got = [(tuple(t.shape), t.dtype) for t in (loc, variance)]
    if got[0] != got[1] or not loc.dtype.is_floating_point:
        msg = (
            f"got means of shape and dtype {got[0]} and variances of {got[1]}. Expected one shape "
            "and one floating dtype: expand the variances, or convert both with .to()"
        )
        raise ValueError(msg)
    return GaussianTensor(loc, variance)


class GaussianTensor(Tensor):
    """A tensor whose elements are independent Gaussians; made by `gaussian`.

    It goes where a tensor goes, such as into the weight of a layer. A torch function either has a
    rule for it or raises `UnknownOperationError`.
    """

    loc: Tensor
    variance: Tensor

    @staticmethod
    @override
    def __new__(cls, loc: Tensor, variance: Tensor) -> GaussianTensor:
        # A wrapper holds no data, so that nothing can take the mean for a value by mistake.
        new = Tensor._make_wrapper_subclass(cls, loc.shape, dtype=loc.dtype, device=loc.device)
        new.loc, new.variance = loc, variance
        return new

    @override
    def __repr__(self) -> str:  # type: ignore[override]
        return f"GaussianTensor(loc={self.loc}, variance={self.variance})"

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        try:
            rule = MOMENT_RULES[func]
        except KeyError:
            raise unknown_operation(func) from None
        return rule(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types, args, kwargs
        raise unknown_operation(func)


class UnknownOperationError(NotImplementedError):
    """A torch function or a distribution that has no rule for Gaussian tensors."""


def register(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Add a rule for functions such as ``torch.abs`` and ``torch.Tensor.abs``, as a decorator.

    The rule takes their arguments, any of which may be a `GaussianTensor`.
    """

    def add(rule: Callable[..., Any]) -> Any:
        MOMENT_RULES.update(dict.fromkeys(functions, rule))
        return rule

    return add


def unknown_operation(func: Callable[..., Any], reason: str = "") -> UnknownOperationError:
    """Return the error for a function without a rule, with a ``reason`` such as "with dilation"."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    name = name.removesuffix(".__get__")
    last = name.rsplit(".", 1)[-1]
    if last in _IN_PLACE or (last.endswith("_") and not last.endswith("__")):
        reason = "in place: write x = x + y for x += y"
    elif last in _COMPARISONS:
        reason = "(distributions compare parameters only with validation on: turn it off)"
    return UnknownOperationError(
        f"{name} has no rule for Gaussian tensors{reason and ' ' + reason}. Use estimator 'local' "
        f"or 'global', or add a rule with @pyro_bmr.estimators.propagation.register({name})"
    )


def named(*names: str) -> list[Any]:
    """Return all functions and methods that go by these names."""
    found = [getattr(home, n, None) for n in names for home in (torch, Tensor, F)]
    return [function for function in found if callable(function)]


MOMENT_RULES: dict[Any, Callable[..., Any]] = {}
"""By torch function, the moments of its result; all others are errors."""

_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__"}
_COMPARISONS = {f"{u}{n}{u}" for n in ("eq", "ne", "ge", "gt", "le", "lt") for u in ("", "__")}


# What only reads the shape, the dtype and the device, or makes a plain tensor like this one.
def _of_the_loc(func: Callable[..., Any]) -> Callable[..., Any]:
    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, GaussianTensor):
            raise unknown_operation(func, "as an argument of a method of a plain tensor")
        return func(x.loc, *args, **kwargs)

    return rule


_ATTRIBUTES = ["shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_sparse", "is_meta"]
for _function in [
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *named("dim", "size", "numel", "nelement", "ndimension", "__len__", "stride", "get_device"),
    *named("is_floating_point", "is_complex", "is_contiguous", "zeros_like", "ones_like"),
    *named("new_zeros", "new_ones", "new_full", "new_tensor", "new_empty", "element_size"),
]:
    register(_function)(_of_the_loc(_function))


@register(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def _requires_grad(x: GaussianTensor) -> bool:
    return x.loc.requires_grad or x.variance.requires_grad
