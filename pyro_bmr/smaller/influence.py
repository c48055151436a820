r"""Which units have an influence on what a model is for.

Each tensor of the graph is replaced by two of the same shape. One is positive where an element may
be other than zero, and zero where it is exactly zero for all inputs and all draws. The other is
positive everywhere, and stands for the element wherever a function of zero is not zero. Sums and
products of such tensors are positive where those of the real ones may be other than zero, and the
derivative with respect to a term is positive where, and only where, a path of such factors leads
from it to an output.

A unit is needed where it is summed over, in a matrix product or a convolution. It multiplies a
number there whose derivative is zero if its term is exactly zero, or if nothing depends on the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typing_extensions import override

from pyro_bmr.structure.capture import Capture
from pyro_bmr.structure.units import Structure


def find_needed(
    capture: Capture,
    inputs: Sequence[Tensor],
    structure: Structure,
    masks: Mapping[str, Tensor],
) -> Tensor:
    """Tell which units cannot go without changing what the model computes.

    Parameters
    ----------
    capture : Capture
        The model as a graph.
    inputs : sequence of Tensor
        What it was captured with: the values of its sites, then the tensors of its arguments.
    structure : Structure
        Its units.
    masks : mapping
        By latent site, False where it is exactly zero in every draw; True everywhere for others.

    Returns
    -------
    Tensor
        Boolean, by label, True if needed.

    Examples
    --------
    >>> find_needed.__name__
    'find_needed'
    """
    num_units = sum(len(layer.units) for layer in structure.layers)
    run = _Run(capture, inputs, structure, num_units, masks)
    for node in capture.graph.graph.nodes:
        run.visit(node)
    ends = [node for _, node in capture.outputs]
    ends += [node for nodes in capture.priors.values() for node in nodes]
    total = sum((run.pairs[node][0].sum() for node in ends if node in run.pairs), torch.zeros(()))
    if not isinstance(total, Tensor) or not total.requires_grad:
        return torch.zeros(num_units, dtype=torch.bool)
    (influence,) = torch.autograd.grad(total, [run.terms], allow_unused=True)
    return torch.zeros(num_units, dtype=torch.bool) if influence is None else influence.cpu() > 0


Pair = tuple[Tensor, Tensor]


class _Run:
    """One pass through the graph, with the real values beside the pairs."""

    def __init__(
        self,
        capture: Capture,
        inputs: Sequence[Tensor],
        structure: Structure,
        num_units: int,
        masks: Mapping[str, Tensor],
    ) -> None:
        self.labels = structure.nodes
        self.pairs: dict[fx.Node, Any] = {}
        self.real = _real_values(capture, inputs)
        self.roots: dict[fx.Node, fx.Node] = {}
        like = next((v for v in self.real.values() if isinstance(v, Tensor)), torch.zeros(()))
        self.device = like.device
        self.terms = torch.ones(num_units, dtype=torch.float64, device=self.device)
        self.terms.requires_grad_()
        for name, node in capture.sites.items():
            value = self.real[node]
            if value.is_floating_point():
                mask = masks.get(name)
                kept = torch.ones_like(value) if mask is None else mask.expand(value.shape)
                self._start(node, kept)
        for node in capture.inputs.values():
            if self.real[node].is_floating_point():
                self._start(node, torch.ones_like(self.real[node]))
        for name, node in capture.tensors.items():
            value = capture.originals[name].detach()
            if value.is_floating_point():
                trained = capture.originals[name].requires_grad
                self._start(node, torch.ones_like(value) if trained else value != 0)

    def visit(self, node: fx.Node) -> None:
        if node.op != "call_function" or node in self.pairs:
            if node.op == "get_attr" and node not in self.pairs:
                self._constant(node)
            return
        operands = [n for n in node.all_input_nodes if n in self.pairs]
        if not operands:
            self._constant(node)
            return
        name = _operation(node)
        if name == "getitem":
            parent, index = node.args
            part: Any = self.pairs[parent]
            if isinstance(part, list) and part[index] is not None:
                self.pairs[node] = part[index]
            return
        rule = _RULES.get(name, _unknown)
        result = rule(self, node)
        self.pairs[node] = result
        self._share(node, operands)

    def _start(self, node: fx.Node, nonzero: Tensor) -> None:
        value = nonzero.to(self.device, torch.float64)
        self.pairs[node] = value, torch.ones_like(value)

    def _constant(self, node: fx.Node) -> None:
        value = self.real.get(node)
        if isinstance(value, Tensor) and value.is_floating_point():
            self._start(node, value != 0)

    def _share(self, node: fx.Node, operands: list[fx.Node]) -> None:
        """After an operation in place, know nothing of the tensors that share its memory."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return
        target: Any = node.target
        written = _is_in_place(target)
        if written or getattr(target, "is_view", False):
            root = self.roots[node] = self.roots.get(first, first)
            if written:
                for other in [root, *(n for n, r in self.roots.items() if r is root)]:
                    if other is not node and other in self.pairs:
                        self.pairs[other] = self.mixed(self.real[other], [other, *operands])

    def mixed(self, like: Tensor, operands: list[fx.Node]) -> Pair:
        """Something that depends on all of its operands, in a way that is not known."""
        everything = torch.zeros((), dtype=torch.float64, device=self.device)
        for operand in operands:
            for part in _pairs_of(self.pairs[operand]):
                everything = everything + part[1].mean() if part[1].numel() else everything
        ones = torch.ones(like.shape, dtype=torch.float64, device=self.device)
        value = ones * (1 + everything - everything.detach())
        return value, value

    def apply(self, node: fx.Node, which: int, function: Any = None) -> Any:
        """Run an operation on one of the two tensors of each operand."""

        def read(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            return self.pairs[argument][which] if argument in self.pairs else self.real[argument]

        args, kwargs = pytree.tree_map(read, (node.args, dict(node.kwargs)))
        return (function or node.target)(*args, **kwargs)

    def weighted(self, node: fx.Node, dims: list[int]) -> Tensor:
        """Return where a tensor is not zero, times a number for each unit along some axes."""
        value = self.pairs[node][0]
        axes = self.labels[node.name]
        for dim in dims:
            units = axes[dim].to(self.device)
            if (units >= 0).any():
                scale = torch.where(units >= 0, self.terms[units.clamp(min=0)], 1)
                shape = [1] * value.dim()
                shape[dim] = -1
                value = value * scale.reshape(shape)
        return value


class _Values(fx.Interpreter):
    """Runs the graph as it ran when it was captured, without a trace of it."""

    def __init__(self, capture: Capture) -> None:
        super().__init__(capture.graph)
        self.values: dict[fx.Node, Any] = {}

    @override
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in {"get_attr", "placeholder"}:
            result = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), result)
        self.values[n] = result
        return result


def _real_values(capture: Capture, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    run = _Values(capture)
    with torch.no_grad(), torch.random.fork_rng():
        run.run(*inputs)
    return run.values


def _operation(node: fx.Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = target.__name__ if packet is None else packet.__name__
    return name.removesuffix("_") if _is_in_place(target) else name


def _is_in_place(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in schema.arguments[:1]
    )


def _pairs_of(value: Any) -> Iterator[Pair]:
    if isinstance(value, list):
        yield from (part for part in value if part is not None)
    else:
        yield value


def _scaled(value: Tensor) -> Tensor:
    """Bring positive numbers to 1, with positive derivatives."""
    return value / torch.where(value > 0, value, 1).detach()


def _summed(value: Tensor) -> Pair:
    """Pair a sum, of which the terms count that are not zero."""
    value = _scaled(value)
    return value, value + (value == 0).to(value)


def _moved(run: _Run, node: fx.Node) -> Any:
    """Elements at other places: views, slices, concatenations."""
    first, second = (run.apply(node, which) for which in (0, 1))
    if isinstance(first, Tensor):
        return first, second
    return list(zip(first, second, strict=True))


def _same(run: _Run, node: fx.Node) -> Any:
    """A function that is zero at zero."""
    return run.pairs[node.args[0]]


def _nonzero(run: _Run, node: fx.Node) -> Any:
    """A function of one element that is not zero at zero."""
    positive = run.pairs[node.args[0]][1]
    return positive, positive


def _sum_of(run: _Run, node: fx.Node) -> Any:
    """Elements of any of the operands: a sum, a difference, a choice."""
    shape = run.real[node].shape
    parts: list[Pair] = []
    for argument in node.args:
        if isinstance(argument, fx.Node) and argument in run.pairs:
            parts.append(run.pairs[argument])
        elif isinstance(argument, int | float) and argument != 0:
            one = torch.ones((), dtype=torch.float64, device=run.device)
            parts.append((one, one))
        elif isinstance(argument, fx.Node) and _operation(node) != "where":
            one = torch.ones((), dtype=torch.float64, device=run.device)
            parts.append((one, one))
    first, second = (_scaled(sum(part[which] for part in parts)) for which in (0, 1))
    return first.expand(shape), second.expand(shape)


def _product(run: _Run, node: fx.Node) -> Any:
    if not all(isinstance(a, fx.Node) and a in run.pairs for a in node.args[:2]):
        return _factor(run, node)
    first, second = (_scaled(_multiply(run, node, which)) for which in (0, 1))
    return first, second


def _multiply(run: _Run, node: fx.Node, which: int) -> Tensor:
    left, right = (run.pairs[argument][which] for argument in node.args[:2])
    return left * right


def _factor(run: _Run, node: fx.Node) -> Any:
    """A product with a number, or with a tensor of no interest."""
    shape = run.real[node].shape
    operand = next(a for a in node.args[:2] if isinstance(a, fx.Node) and a in run.pairs)
    first, second = run.pairs[operand]
    return first.expand(shape), second.expand(shape)


def _quotient(run: _Run, node: fx.Node) -> Any:
    over, under = node.args[:2]
    if not (isinstance(under, fx.Node) and under in run.pairs):
        return _factor(run, node)
    positive = run.pairs[under][1]
    if not (isinstance(over, fx.Node) and over in run.pairs):
        shape = run.real[node].shape
        return positive.expand(shape), positive.expand(shape)
    first, second = run.pairs[over]
    return _scaled(first * positive), _scaled(second * positive)


def _matrix_product(run: _Run, node: fx.Node) -> Any:
    left, right = (
        node.args[-2:] if _operation(node) in {"mm", "bmm", "mv", "dot"} else node.args[1:3]
    )
    weighted = run.weighted(left, [run.pairs[left][0].dim() - 1])
    value = weighted @ run.pairs[right][0]
    if _operation(node) in {"addmm", "baddbmm", "addmv"}:
        value = value + run.pairs[node.args[0]][0]
    return _summed(value)


def _convolution(run: _Run, node: fx.Node) -> Any:
    inputs, weight, bias = node.args[:3]
    weighted = run.weighted(inputs, [1])
    rest = node.args[3:]
    value = torch.ops.aten.convolution(
        weighted, run.pairs[weight][0], None if bias is None else run.pairs[bias][0], *rest
    )
    return _summed(value)


def _reduction(run: _Run, node: fx.Node) -> Any:
    operand = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    total = run.pairs[operand][0].dim()
    if dims is None or isinstance(dims, list) and not dims:
        dims = list(range(total))
    dims = [dim % total for dim in ([dims] if isinstance(dims, int) else dims)] if total else []
    value = run.weighted(operand, dims)
    value = value.sum(dims) if dims else value
    result = _summed(value.reshape(_first(run.real[node]).shape))
    return result if isinstance(run.real[node], Tensor) else [result, None]


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _pool(run: _Run, node: fx.Node) -> Any:
    """A mean or a maximum over places is zero if all are; where either may not be."""
    x, size, *rest = node.args
    name = _operation(node)
    if name.startswith("adaptive_avg") or name.startswith("_adaptive_avg"):
        return _summed(run.apply(node, 0))
    if name.startswith("avg"):
        return _summed(run.apply(node, 0))
    stride, padding, dilation, ceil = (*rest, *([], 0, 1, False)[len(rest) :])
    if any(d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation)):
        return _unknown(run, node)
    pool = {"1": F.avg_pool1d, "2": F.avg_pool2d, "3": F.avg_pool3d}[name[len("max_pool")]]
    value = pool(run.pairs[x][0], size, stride or size, padding, ceil)
    return [_summed(value), None]


def _batch_norm(run: _Run, node: fx.Node) -> Any:
    """Each channel by itself: gain times something that is zero with the mean and the input."""
    x, gain, shift, mean = node.args[:4]
    shape = [1, -1] + [1] * (run.pairs[x][0].dim() - 2)
    training = any(argument is True for argument in node.args)
    pairs = []
    for which in (0, 1):
        value = run.pairs[x][which]
        if training:
            # Every element of a channel moves the others through its mean.
            others = [dim for dim in range(value.dim()) if dim != 1]
            value = value + value.mean(others, keepdim=True)
        elif isinstance(mean, fx.Node):
            value = value + run.pairs[mean][which].reshape(shape)
        if gain is not None:
            value = value * run.pairs[gain][which].reshape(shape)
        if shift is not None:
            value = value + run.pairs[shift][which].reshape(shape)
        pairs.append(_scaled(value))
    return [tuple(pairs), *[None] * (len(run.real[node]) - 1)]


def _unknown(run: _Run, node: fx.Node) -> Any:
    operands = [n for n in node.all_input_nodes if n in run.pairs]
    value = run.real[node]
    if isinstance(value, Tensor):
        return run.mixed(value, operands)
    return [run.mixed(part, operands) if isinstance(part, Tensor) else None for part in value]


_MOVES = (
    "view _unsafe_view reshape expand permute transpose t unsqueeze squeeze slice select cat stack "
    "split split_with_sizes chunk unbind alias detach clone contiguous flatten unflatten "
    "constant_pad_nd unfold repeat flip roll index index_select gather embedding diagonal tril triu "
    "_to_copy lift_fresh_copy as_strided expand_as view_as pixel_shuffle upsample_nearest2d movedim"
)
_ZERO_AT_ZERO = (
    "relu tanh gelu silu leaky_relu elu celu selu mish hardswish softshrink hardshrink sin asin tan "
    "atan sinh asinh atanh abs neg sqrt square sign erf expm1 log1p native_dropout dropout "
    "positive round floor trunc"
)
_NOT_ZERO_AT_ZERO = (
    "sigmoid exp exp2 softplus cos cosh rsqrt log log2 reciprocal hardsigmoid erfc digamma lgamma "
    "log_sigmoid_forward threshold"
)
_RULES: dict[str, Callable[[_Run, fx.Node], Any]] = {
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(_ZERO_AT_ZERO.split(), _same),
    **dict.fromkeys(_NOT_ZERO_AT_ZERO.split(), _nonzero),
    **dict.fromkeys(("add", "sub", "rsub", "where", "maximum", "minimum"), _sum_of),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"), _matrix_product),
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _reduction),
    **dict.fromkeys(
        ("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), _pool
    ),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _pool),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    "mul": _product,
    "div": _quotient,
    "convolution": _convolution,
}
