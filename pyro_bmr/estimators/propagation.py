r"""Gaussian tensors: means and variances pushed through torch functions, with no sampling.

.. math:: \operatorname{Var}[x w] = m_x^2 v_w + v_x m_w^2 + v_x v_w

for independent :math:`x` and :math:`w`, summed over what a linear layer sums (Haussmann, Hamprecht
& Kandemir 2019, "Sampling-free variational inference of Bayesian neural networks by variance
backpropagation", arXiv:1805.07654).

The elements of every tensor count as independent of each other and of every other tensor, and as
Gaussian. The moments are exact as far as that is true: for one linear layer, each output by
itself. What elements share, such as an input of two units, a filter of two pixels, or the two
branches of a skip connection, is dropped where they are added up later on.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.estimators.gaussian_tensor import (
    GaussianTensor,
    named,
    register,
    unknown_operation,
)
from pyro_bmr.estimators.nonlinearities import (
    exp_moments,
    logsumexp_bound,
    max_moments,
    relu_moments,
    smooth_moments,
    square_moments,
)


def _loc(x: Any) -> Any:
    return x.loc if isinstance(x, GaussianTensor) else x


def _variance(x: Any) -> Any:
    return x.variance if isinstance(x, GaussianTensor) else 0


def _wrap(loc: Tensor, variance: Tensor) -> GaussianTensor:
    return GaussianTensor(loc, variance.to(loc.dtype).expand(loc.shape))


# What moves, picks or adds up elements does the same to means and to variances.
def _of_both(func: Callable[..., Any]) -> Callable[..., Any]:
    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, GaussianTensor):
            raise unknown_operation(func, "as an argument of a method of a plain tensor")
        loc, variance = (func(t, *args, **kwargs) for t in (x.loc, x.variance))
        return _wrap(loc, variance) if isinstance(loc, Tensor) else tuple(map(_wrap, loc, variance))

    return rule


for _function in [
    *named("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "t"),
    *named("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint"),
    *named("expand", "broadcast_to", "__getitem__", "select", "narrow", "index_select", "flip"),
    *named("chunk", "split", "tensor_split", "unbind", "sum", "contiguous", "clone", "detach"),
    *named("to", "type", "cpu", "cuda", "float", "double", "half", "bfloat16"),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
]:
    register(_function)(_of_both(_function))


@register(Tensor.__iter__)
def _iterate(x: GaussianTensor) -> Iterator[Tensor]:
    return iter(x.unbind(0))


@register(Tensor.expand_as)
def _expand_as(x: Tensor, other: Tensor) -> Tensor:
    return x.expand(other.shape)


@register(Tensor.view_as, Tensor.reshape_as)
def _reshape_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)


@register(torch.broadcast_tensors)
def _broadcast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return tuple(t.expand(shape) for t in tensors)


def _join(func: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> GaussianTensor:
    variances = [t.variance if isinstance(t, GaussianTensor) else t * 0 for t in tensors]
    return _wrap(
        func([_loc(t) for t in tensors], *args, **kwargs), func(variances, *args, **kwargs)
    )


for _function in named("cat", "concat", "concatenate", "stack"):
    register(_function)(partial(_join, _function))


@register(torch.where)
def _where(condition: Tensor, x: Any, y: Any) -> GaussianTensor:
    if isinstance(condition, GaussianTensor):
        raise unknown_operation(torch.where, "as the condition")
    variance = torch.where(condition, _variance(x), _variance(y))
    return _wrap(torch.where(condition, _loc(x), _loc(y)), variance)


@register(Tensor.where)
def _where_method(x: Any, condition: Tensor, y: Any) -> GaussianTensor:
    return _where(condition, x, y)


@register(*named("add", "__add__", "__radd__"))
def _add(x: Any, y: Any, *, alpha: float = 1) -> GaussianTensor:
    if x is y:
        return x * (1 + alpha)
    y = y if alpha == 1 else y * alpha
    return _wrap(_loc(x) + _loc(y), _variance(x) + _variance(y))


@register(*named("sub", "subtract", "__sub__"))
def _sub(x: Any, y: Any, *, alpha: float = 1) -> GaussianTensor:
    return _add(x, y, alpha=-alpha)


@register(*named("rsub", "__rsub__"))
def _rsub(x: Any, y: Any, *, alpha: float = 1) -> GaussianTensor:
    return _add(y, x, alpha=-alpha)


@register(*named("neg", "negative", "__neg__"))
def _neg(x: GaussianTensor) -> GaussianTensor:
    return _wrap(-x.loc, x.variance)


@register(*named("lerp"))
def _lerp(x: Any, y: Any, weight: Any) -> GaussianTensor:
    # (1 - w) x + w y, of which those of its terms that share w would not be independent.
    w, spread, gap = _loc(weight), _variance(weight), _loc(y) - _loc(x)
    variance = ((1 - w) ** 2 + spread) * _variance(x) + (w**2 + spread) * _variance(y)
    return _wrap(_loc(x) + w * gap, variance + spread * gap**2)


@register(*named("div", "divide", "true_divide", "__truediv__"))
def _div(x: Any, y: Any) -> GaussianTensor:
    if isinstance(y, GaussianTensor):
        raise unknown_operation(torch.div, "as the divisor")
    return _wrap(x.loc / y, x.variance / (y * y))


@register(*named("square"))
def _square(x: GaussianTensor) -> GaussianTensor:
    return _wrap(*square_moments(x.loc, x.variance))


@register(*named("pow", "__pow__"))
def _pow(x: Any, exponent: Any) -> GaussianTensor:
    if isinstance(exponent, Tensor) or exponent != 2:
        raise unknown_operation(torch.pow, "with an exponent other than 2")
    return _square(x)


@register(*named("mean"))
def _mean(x: GaussianTensor, *args: Any, **kwargs: Any) -> GaussianTensor:
    loc, variance = (t.mean(*args, **kwargs) for t in (x.loc, x.variance))
    return _wrap(loc, variance * (loc.numel() / x.loc.numel()))


@register(*named("mul", "multiply", "__mul__", "__rmul__"))
def _mul(x: Any, y: Any) -> GaussianTensor:
    return _square(x) if x is y else _bilinear(operator.mul, x, y)


def _bilinear(func: Callable[..., Any], x: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
    # Right where no element meets two of the other operand in one output.
    if x is w:
        raise unknown_operation(getattr(func, "func", func), "with itself")

    def f(a: Any, b: Any) -> Tensor:
        return func(a, b, *args, **kwargs)

    loc = f(_loc(x), _loc(w))
    if not (isinstance(x, GaussianTensor) or isinstance(w, GaussianTensor)):
        return loc
    if not isinstance(x, GaussianTensor):
        return _wrap(loc, f(x * x, w.variance))
    if not isinstance(w, GaussianTensor):
        return _wrap(loc, f(x.variance, w * w))
    second_moment = x.loc.square() + x.variance
    return _wrap(loc, f(second_moment, w.variance) + f(x.variance, w.loc.square()))


for _function in named(
    *("matmul", "__matmul__", "mm", "bmm", "mv", "dot", "inner", "outer", "tensordot")
):
    register(_function)(partial(_bilinear, _function))


@register(Tensor.__rmatmul__)
def _rmatmul(w: Any, x: Any) -> GaussianTensor:
    return _bilinear(torch.matmul, x, w)


@register(*named("addmm", "addmv", "baddbmm"))
def _add_matmul(c: Any, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> GaussianTensor:
    return c * beta + _bilinear(torch.matmul, x, w) * alpha


@register(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> GaussianTensor:
    tensors = operands[0] if isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(tensors) > 2:
        raise unknown_operation(torch.einsum, "of more than two operands, or without an equation")
    if len(tensors) == 1:
        return _of_both(partial(torch.einsum, equation))(tensors[0])
    terms, arrow, output = equation.replace(" ", "").partition("->")
    dots = "..." * ("..." in terms)
    if not arrow:
        letters = terms.replace(",", "").replace(".", "")
        output = dots + "".join(sorted(i for i in letters if letters.count(i) == 1))
    if dots not in output:
        raise unknown_operation(torch.einsum, "that sums over an ellipsis")
    # What only one operand has is summed there first: (Σᵢ xᵢ) w is no sum of independent xᵢ w.
    x, w = tensors
    left, right = terms.split(",")
    x, left = _sum_out(x, left, right + output)
    w, right = _sum_out(w, right, left + output)
    return _bilinear(partial(_einsum_last, f"{left},{right}->{output}"), x, w)


def _einsum_last(equation: str, x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum(equation, x, w)


def _sum_out(x: Any, term: str, others: str) -> tuple[Any, str]:
    kept = "".join(dict.fromkeys(i for i in term if i in others and i != "."))
    kept = "..." * ("..." in term) + kept
    return (x, term) if kept == term else (torch.einsum(f"{term}->{kept}", x), kept)


@register(F.linear)
def _linear(x: Any, weight: Any, bias: Any = None) -> GaussianTensor:
    if isinstance(x, GaussianTensor) and isinstance(weight, GaussianTensor) and x is not weight:
        # Both sums of the variance as one: matrices of small networks cost by their number.
        moments = torch.cat([x.loc.square() + x.variance, x.variance], -1)
        factors = torch.cat([weight.variance, weight.loc.square()], -1)
        product = _wrap(F.linear(x.loc, weight.loc), F.linear(moments, factors))
    else:
        product = _bilinear(F.linear, x, weight)
    return product if bias is None else product + bias


def _convolve(
    func: Callable[..., Any], x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> GaussianTensor:
    product = _bilinear(func, x, weight, None, *args, **kwargs)
    return product if bias is None else product + bias.reshape(-1, *[1] * (weight.dim() - 2))


def _avg_pool(
    func: Callable[..., Any],
    dims: int,
    x: GaussianTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> GaussianTensor:
    padded = any(_each(padding, dims))
    if ceil_mode or (padded and not count_include_pad):
        raise unknown_operation(func, "with ceil_mode, or padding that does not count")
    divisor = {} if divisor_override is None else {"divisor_override": divisor_override}
    pool = partial(func, kernel_size=kernel_size, stride=stride or kernel_size, padding=padding)
    size = divisor_override or math.prod(_each(kernel_size, dims))
    return _wrap(pool(x.loc, **divisor), pool(x.variance, **divisor) / size)


def _adaptive_avg_pool(
    func: Callable[..., Any], dims: int, x: GaussianTensor, output_size: Any
) -> Any:
    if any(size != 1 for size in _each(output_size, dims)):
        raise unknown_operation(func, "to an output size other than 1")
    return x.mean(tuple(range(-dims, 0)), keepdim=True)


def _max_pool(
    func: Callable[..., Any],
    dims: int,
    x: GaussianTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> GaussianTensor:
    if ceil_mode or return_indices or any(d != 1 for d in _each(dilation, dims)):
        raise unknown_operation(func, "with dilation, ceil_mode or return_indices")
    sizes, strides = _each(kernel_size, dims), _each(stride or kernel_size, dims)
    margins = [m for p in reversed(_each(padding, dims)) for m in (p, p)]

    def windows(t: Tensor, value: float) -> Tensor:
        t = F.pad(t, margins, value=value)
        for i in range(dims):
            t = t.unfold(x.dim() - dims + i, sizes[i], strides[i])
        return t.flatten(-dims)

    lowest = torch.finfo(x.dtype).min / 4
    return _wrap(*max_moments(windows(x.loc, lowest), windows(x.variance, 0.0)))


def _each(size: Any, dims: int) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dims if len(sizes) == 1 else sizes


_POOLS: dict[str, Callable[..., Any]] = {
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "max_pool": _max_pool,
}
for _dims in (1, 2, 3):
    for _name, _rule in _POOLS.items():
        for _function in named(f"{_name}{_dims}d"):
            register(_function)(partial(_rule, _function, _dims))
    for _function in named(f"conv{_dims}d", f"conv_transpose{_dims}d"):
        register(_function)(partial(_convolve, _function))


@register(F.batch_norm)
def _batch_norm(
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    del momentum
    if training or running_mean is None or running_var is None:
        raise unknown_operation(F.batch_norm, "in training: call model.eval()")
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - running_mean.reshape(shape)) * (running_var + eps).rsqrt().reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


@register(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
def _dropout(
    x: GaussianTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> GaussianTensor:
    del inplace
    if training and p > 0:
        raise unknown_operation(F.dropout, "in training: call model.eval()")
    return x


@register(*named("relu"))
def _relu(x: GaussianTensor, inplace: bool = False) -> GaussianTensor:
    return _activate(x, relu_moments(x.loc, x.variance), inplace)


@register(F.leaky_relu)
def _leaky_relu(
    x: GaussianTensor, negative_slope: float = 0.01, inplace: bool = False
) -> GaussianTensor:
    return _activate(x, relu_moments(x.loc, x.variance, negative_slope), inplace)


def _smooth(
    func: Callable[..., Any], x: GaussianTensor, *args: Any, inplace: bool = False, **kwargs: Any
) -> GaussianTensor:
    def function(t: Tensor) -> Tensor:
        return func(t, *args, **kwargs)

    return _activate(x, smooth_moments(function, x.loc, x.variance), inplace)


for _function in named(
    *("tanh", "sigmoid", "softplus", "gelu", "silu", "mish", "elu", "logsigmoid")
):
    register(_function)(partial(_smooth, _function))


def _activate(x: GaussianTensor, moments: tuple[Tensor, Tensor], inplace: bool) -> GaussianTensor:
    if inplace:
        x.loc, x.variance = moments
        return x
    return _wrap(*moments)


@register(*named("exp"))
def _exp(x: GaussianTensor) -> GaussianTensor:
    return _wrap(*exp_moments(x.loc, x.variance))


@register(*named("logsumexp"))
def _logsumexp(x: GaussianTensor, dim: Any, keepdim: bool = False) -> Tensor:
    return logsumexp_bound(x.loc, x.variance, dim, keepdim)


@register(*named("log_softmax"))
def _log_softmax(x: Any, dim: int, dtype: Any = None, **_: Any) -> Any:
    x = x if dtype is None else x.to(dtype)
    return x - x.logsumexp(dim, keepdim=True)
