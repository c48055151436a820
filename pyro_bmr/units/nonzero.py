"""By operation, where its result may be other than zero: see `pyro_bmr.units.nonzero_pairs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pyro_bmr.graphs.operations import name_operation
from pyro_bmr.units.nonzero_pairs import NonzeroPair, Pairs, scaled, unknown


def _positive(value: Tensor) -> Tensor:
    return value + (value == 0).to(value)


def _summed(value: Tensor) -> NonzeroPair:
    """NonzeroPair a sum: a function of it depends on the terms that are not zero."""
    value = scaled(value)
    return value, _positive(value)


def _shaped(run: Pairs, node: Any, pair: NonzeroPair) -> Any:
    """Bring a pair to the shape of the result, or to the first of several results."""
    value = run.real[node]
    if isinstance(value, Tensor):
        return pair[0].expand(value.shape), pair[1].expand(value.shape)
    first = pair[0].expand(value[0].shape), pair[1].expand(value[0].shape)
    return [first, *[None] * (len(value) - 1)]


def _in_pairs(run: Pairs, arguments: Any) -> list[NonzeroPair]:
    return [run.pairs[a] for a in arguments if isinstance(a, fx.Node) and a in run.pairs]


def _move(run: Pairs, node: fx.Node) -> Any:
    """Put elements at other places: views, slices, concatenations."""
    if any(n in run.pairs and not _is_float(run.real[n]) for n in node.all_input_nodes):
        return unknown(run, node)
    name = name_operation(node)
    function = torch.reshape if name in {"view", "_unsafe_view"} else None
    first, second = (run.apply(node, which, function) for which in (0, 1))
    if isinstance(first, Tensor):
        return first, _positive(second)
    return [(p, _positive(t)) for p, t in zip(first, second, strict=True)]


def _is_float(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_floating_point()


def _look_up(run: Pairs, node: fx.Node) -> Any:
    """Take elements by numbers: any element, where the numbers are not those of the program."""
    table, *arguments = cast(Any, node.args)
    dims = _looked_up(node)
    varied = [a for a in pytree.tree_leaves(arguments) if a in run.pairs]
    if not varied:
        return _move(run, node)
    if table not in run.pairs:
        return unknown(run, node)
    depends = torch.ones((), dtype=torch.float64, device=run.device)
    for numbers in varied:
        depends = depends * run.pairs[numbers][1].mean()

    def take_any(part: Tensor, *rest: Any) -> Tensor:
        anywhere = scaled(part.mean(dims, keepdim=True)).expand(part.shape)
        return scaled(depends * cast(Any, node.target)(anywhere, *rest, **node.kwargs))

    first, second = (run.apply(node, which, take_any) for which in (0, 1))
    return first, second


def _looked_up(node: fx.Node) -> list[int]:
    """Find the axes of the first argument along which it is looked up."""
    name = name_operation(node)
    if name == "index":
        indices: Any = node.args[1]
        return [dim for dim, index in enumerate(indices) if index is not None]
    return [0] if name == "embedding" else [cast(Any, node.args[1])]


def _pad(run: Pairs, node: fx.Node) -> Any:
    x, size, *value = node.args
    filled = float(bool(value and value[0]))
    first, second = (
        torch.ops.aten.constant_pad_nd(part, size, fill)
        for part, fill in zip(run.pairs[x], (filled, 1.0), strict=True)
    )
    return first, second


def _keep(run: Pairs, node: fx.Node) -> Any:
    """Apply a function that is zero at zero."""
    return _shaped(run, node, run.pairs[node.args[0]])


def _lift(run: Pairs, node: fx.Node) -> Any:
    """Apply a function of elements that is not zero where they are."""
    positive = torch.ones((), dtype=torch.float64, device=run.device)
    for _, other in _in_pairs(run, node.args):
        positive = positive * other
    return _shaped(run, node, (positive, positive))


def _clamp(run: Pairs, node: fx.Node) -> Any:
    lower, upper = (*node.args[1:3], None, None)[:2]
    numbers = [n for n in (lower, upper) if n is not None]
    if not all(isinstance(n, int | float) for n in numbers):
        return unknown(run, node)
    low, high = (0 if bound is None else bound for bound in (lower, upper))
    return (_keep if cast(float, low) <= 0 <= cast(float, high) else _lift)(run, node)


def _power(run: Pairs, node: fx.Node) -> Any:
    exponent = node.args[1]
    positive = isinstance(exponent, int | float) and exponent > 0
    return (_keep if positive else _lift)(run, node)


def _add(run: Pairs, node: fx.Node) -> Any:
    """Add, subtract, or take the greater: zero where all operands are."""
    parts = _in_pairs(run, node.args)
    if len(parts) < 2 and any(a in (0, 0.0) for a in node.args[:2] if not isinstance(a, fx.Node)):
        return _shaped(run, node, parts[0])
    if len(parts) < 2:
        one = torch.ones((), dtype=torch.float64, device=run.device)
        parts.append((one, one))
    sums: Any = (sum(part[which] for part in parts) for which in (0, 1))
    first, second = (scaled(total) for total in sums)
    return _shaped(run, node, (first, second))


def _choose(run: Pairs, node: fx.Node) -> Any:
    """Take one or the other, by a condition that may depend on something."""
    pair = [sum(p[which] for p in _in_pairs(run, node.args[1:])) for which in (0, 1)]
    condition = torch.ones((), dtype=torch.float64, device=run.device)
    for _, positive in _in_pairs(run, node.args[:1]):
        condition = condition * positive
    first, second = (scaled(part * condition) for part in pair)
    return _shaped(run, node, (first, second))


def _fill(run: Pairs, node: fx.Node) -> Any:
    x, _, value = node.args
    if not isinstance(value, int | float) or value != 0:
        return _lift(run, node)
    pair: Any = run.pairs[x]
    for _, positive in _in_pairs(run, node.args[1:2]):
        pair = pair[0] * positive, pair[1] * positive
    return _shaped(run, node, pair)


def _multiply(run: Pairs, node: fx.Node) -> Any:
    first = second = torch.ones((), dtype=torch.float64, device=run.device)
    for p, t in _in_pairs(run, node.args[:2]):
        first, second = first * p, second * t
    for factor in node.args[:2]:
        if isinstance(factor, int | float) and factor == 0:
            first = 0 * first
    return _shaped(run, node, (scaled(first), scaled(second)))


def _divide(run: Pairs, node: fx.Node) -> Any:
    over, under = (_in_pairs(run, [argument]) for argument in node.args[:2])
    first = second = torch.ones((), dtype=torch.float64, device=run.device)
    for p, t in over:
        first, second = first * p, second * t
    for _, t in under:
        first, second = first * t, second * t
    return _shaped(run, node, (scaled(first), scaled(second)))


def _multiply_matrices(run: Pairs, node: fx.Node) -> Any:
    added = name_operation(node).startswith(("add", "badd"))
    operands: Any = node.args
    left, right = operands[1:3] if added else operands[:2]
    value = run.weighted(left, [run.real[left].dim() - 1]) @ run.read(right)[0]
    return _summed(value + run.read(operands[0])[0] if added else value)


def _convolve(run: Pairs, node: fx.Node) -> Any:
    inputs: Any
    inputs, weight, bias, *rest = node.args
    value = torch.ops.aten.convolution(
        run.weighted(inputs, [1]),
        run.pairs[weight][0],
        None if bias is None else run.pairs[bias][0],
        *rest,
    )
    return _summed(value)


def _sum(run: Pairs, node: fx.Node) -> Any:
    operand: Any = node.args[0]
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    total = run.pairs[operand][0].dim()
    if dims is None or (isinstance(dims, list) and not dims):
        dims = list(range(total))
    dims = [dim % total for dim in ([dims] if isinstance(dims, int) else dims)] if total else []
    value = run.weighted(operand, dims)
    value = value.sum(dims) if dims else value
    return _summed(value.reshape(run.real[node].shape))


def _average_places(run: Pairs, node: fx.Node) -> Any:
    return _summed(run.apply(node, 0))


def _greatest_of_places(run: Pairs, node: fx.Node) -> Any:
    """Find where a maximum may not be zero: where the mean of places that are not is not."""
    x, size, *rest = node.args
    defaults: list[Any] = [[], 0, 1, False]
    stride, padding, dilation, ceil = (list(rest) + defaults[len(rest) :])[:4]
    if set(pytree.tree_leaves(dilation)) != {1}:
        return unknown(run, node)
    pool: Any = F.avg_pool3d if "3d" in name_operation(node) else F.avg_pool2d
    return _shaped(
        run, node, _summed(pool(run.pairs[x][0], size, stride or size, padding, bool(ceil)))
    )


def _normalize_batch(run: Pairs, node: fx.Node) -> Any:
    """Take each channel by itself: its gain times something that is zero with mean and input."""
    x, gain, shift, mean = node.args[:4]
    shape = [1, -1] + [1] * (run.pairs[x][0].dim() - 2)
    training = any(argument is True for argument in node.args)
    pair = []
    for which in (0, 1):
        value = run.pairs[x][which]
        if training:
            # Every element of a channel moves the others through its mean.
            others = [dim for dim in range(value.dim()) if dim != 1]
            value = value + value.mean(others, keepdim=True)
        # The kept mean counts in training too: what was cut must be the same once that is over.
        if mean is not None:
            value = value + run.pairs[mean][which].reshape(shape)
        if gain is not None:
            value = value * run.pairs[gain][which].reshape(shape)
        if shift is not None:
            value = value + run.pairs[shift][which].reshape(shape)
        pair.append(scaled(value))
    return _shaped(run, node, (pair[0], pair[1]))


def _softmax(run: Pairs, node: fx.Node) -> Any:
    positive = run.pairs[node.args[0]][1]
    dim: Any = node.args[1]
    positive = scaled(positive + positive.mean(dim, keepdim=True))
    return positive, positive


NONZERO_RULES: dict[str, Callable[[Pairs, fx.Node], Any]] = {
    **dict.fromkeys(
        (
            "view _unsafe_view expand permute transpose t unsqueeze squeeze slice select cat stack "
            "split split_with_sizes unsafe_split unsafe_split_with_sizes unbind diagonal tril triu "
            "unfold repeat flip roll pixel_shuffle upsample_nearest2d"
        ).split(),
        _move,
    ),
    **dict.fromkeys(("index", "index_select", "gather", "embedding"), _look_up),
    **dict.fromkeys(
        (
            "alias detach clone lift_fresh_copy _to_copy relu tanh gelu silu leaky_relu elu celu "
            "mish hardswish softshrink hardshrink sin asin tan atan sinh asinh atanh abs neg sqrt "
            "sign erf expm1 log1p native_dropout round trunc"
        ).split(),
        _keep,
    ),
    **dict.fromkeys(
        (
            "sigmoid exp exp2 softplus cos cosh rsqrt log log2 reciprocal hardsigmoid erfc "
            "digamma lgamma gt lt ge le eq ne logical_not logical_and logical_or bitwise_not"
        ).split(),
        _lift,
    ),
    **dict.fromkeys(("add", "sub", "rsub", "maximum", "minimum"), _add),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"), _multiply_matrices),
    **dict.fromkeys(("sum", "nansum", "mean"), _sum),
    **dict.fromkeys(
        ("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        _average_places,
    ),
    **dict.fromkeys(
        ("max_pool2d_with_indices", "max_pool3d_with_indices"),
        _greatest_of_places,
    ),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training"), _normalize_batch
    ),
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("clamp", "hardtanh"), _clamp),
    "pow": _power,
    "constant_pad_nd": _pad,
    "where": _choose,
    "masked_fill": _fill,
    "mul": _multiply,
    "div": _divide,
    "convolution": _convolve,
}
"""By operation, the pair of its result; `unknown` for all others."""
