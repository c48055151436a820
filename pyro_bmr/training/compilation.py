"""One step of training as one compiled function.

A Pyro program is Python that runs anew at every step; the tensor operations that it performs are
few. They are traced once, loss and gradient together, and compiled with the optimiser's update.
Parameters, noise and everything else that the program reads become inputs of the traced graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bmr.graphs.operations import find_written, is_random
from pyro_bmr.training.vectors import VectorLayout

aten = torch.ops.aten

# Use the vector instructions that the processor has without trying, for each kind, whether the C++
# compiler knows it: that takes longer than all else. If it does not, compiling fails at once.
_TRUST_PROCESSOR = {"cpp.vec_isa_ok": True}


class NotStaticError(Exception):
    """A program whose operations cannot be traced once and used for every step."""


@dataclass(frozen=True)
class Gradient:
    """The loss of a batch and its gradient, as a traced graph.

    It takes the parameters, the noise vector, ``constants`` (what else the program reads) and the
    batch. ``noise``: the place in that vector of each draw, None if nothing depends on it.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    noise: tuple[slice | None, ...]
    noise_size: int


def trace_gradient(
    loss: Callable[..., Tensor], parameters: Sequence[Tensor], batch: Sequence[Tensor]
) -> Gradient:
    """Trace the loss of a batch and its gradient, for batches of the same shapes.

    A program that looks at the values of tensors, or writes to tensors that outlive it, raises a
    `NotStaticError`.

    Examples
    --------
    >>> w = torch.tensor([2.0], requires_grad=True)
    >>> gradient = trace_gradient(lambda x: (w * x).sum() ** 2, [w], [torch.ones(1)])
    >>> gradient.graph(w.detach(), torch.empty(0), torch.tensor([3.0]))
    (tensor(36.), tensor([36.]))
    """

    def loss_and_gradients(*batch: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            value = loss(*batch)
            gradients = torch.autograd.grad(
                value, list(parameters), allow_unused=True, materialize_grads=True
            )
        return value.detach(), *gradients

    try:
        with pyro.validation_enabled(False), _WithoutChecks():
            graph = _trace(loss_and_gradients, batch)
    except RuntimeError as error:
        if "_local_scalar_dense" in str(error) or "data-dependent" in str(error):
            msg = "it looks at the value of a tensor (a branch, float() or .item())"
            raise NotStaticError(msg) from error
        msg = f"tracing failed with {type(error).__name__}: {_first_line(error)}"
        raise NotStaticError(msg) from error
    return _lift(graph, parameters)


class FixedNoise(TorchDispatchMode):
    """Let the program of a gradient draw given standard normal numbers, not random ones."""

    def __init__(self, gradient: Gradient, values: Tensor) -> None:
        super().__init__()
        self._places = iter(gradient.noise)
        self._values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_standard_normal(func, args, kwargs):
            return func(*args, **kwargs)
        # The generator is left alone, for what else the program draws from it.
        if func is aten.randn.default:
            device = kwargs.get("device") or "cpu"
            result = torch.zeros(args[0], dtype=kwargs.get("dtype"), device=device)
        else:
            result = args[0] if func is aten.normal_.default else torch.zeros_like(args[0])
        place = next(self._places, None)
        return result if place is None else result.copy_(self._values[place].view(result.shape))


def join_gradient(gradient: Gradient, layout: VectorLayout) -> Callable[..., tuple[Tensor, ...]]:
    """Make a function from the vectors of a layout to those of the gradient, and the loss.

    It also takes the noise, the constants and the batch.
    """
    count = len(layout.vectors)

    def differentiate(*inputs: Tensor) -> tuple[Tensor, ...]:
        parameters = layout.split(inputs[:count]).values()
        loss, *gradients = gradient.graph(*parameters, *inputs[count:])
        return *layout.join(dict(zip(layout.shapes, gradients, strict=True))), loss

    return differentiate


def compile_step(
    step: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile a function of tensors, without the guards that `torch.compile` would run each time.

    It is for the shapes of the example. The same operations on them are compiled once per process,
    so that the rounds of `pyro_bmr.prune` and the seeds of an experiment share what they compile.
    A compiler that fails, or is not there, raises a `NotStaticError`.
    """
    # Compiling runs the function once, or not at all if it is known.
    with torch.no_grad(), torch.random.fork_rng():
        graph = _trace(step, example)
        # Left over from tracing twice, and at odds with what the compiler notes there.
        for node in graph.graph.nodes:
            node.meta.clear()
        key = _key(graph, example)
        if key not in _COMPILED:
            if len(_COMPILED) >= _MOST_COMPILED:
                del _COMPILED[next(iter(_COMPILED))]
            _COMPILED[key] = graph, _compile(graph, example)
        return _COMPILED[key][1]


_MOST_COMPILED = 100

# With the graph, whose own tensors the key names by their identity.
_COMPILED: dict[Hashable, tuple[fx.GraphModule, Callable[..., tuple[Tensor, ...]]]] = {}


def _key(graph: fx.GraphModule, example: Sequence[Tensor]) -> Hashable:
    """Return all that a compiled function depends on."""
    inputs = tuple((t.shape, t.stride(), t.dtype, t.device) for t in example)
    own = tuple(id(getattr(graph, node.target)) for node in graph.graph.find_nodes(op="get_attr"))
    return graph.code, inputs, own, torch.get_num_threads()


def _compile(graph: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    options = {"size_asserts": False, "fallback_random": True}
    with suppress(Exception):
        return _compile_with(options | _TRUST_PROCESSOR, graph, example)
    try:
        return _compile_with(options, graph, example)
    except Exception as error:
        msg = f"the compiler failed with {type(error).__name__}: {_first_line(error)}"
        raise NotStaticError(msg) from error


def _compile_with(
    options: dict[str, Any], graph: fx.GraphModule, example: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    compiled = torch._inductor.compile(graph, list(example), options=options)
    compiled(*example)
    return compiled


def _trace(function: Callable[..., Any], example: Sequence[Tensor]) -> fx.GraphModule:
    # The shapes that are noted at each node share this mode, which otherwise each would make anew.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function)(*example)


def _lift(module: fx.GraphModule, parameters: Sequence[Tensor]) -> Gradient:
    """Turn what a traced graph reads or draws into inputs."""
    graph = module.graph
    batch_start = next(iter(graph.nodes))
    with graph.inserting_before(batch_start):
        inputs = {
            id(value): graph.placeholder(f"parameter_{i}") for i, value in enumerate(parameters)
        }
        noise = graph.placeholder("noise")
    constants: list[Tensor] = []
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        if id(value) not in inputs:
            with graph.inserting_before(batch_start):
                inputs[id(value)] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(value.detach())
        node.replace_all_uses_with(inputs[id(value)])
        graph.erase_node(node)
    _check_nothing_is_written(graph)
    draws = [n for n in graph.nodes if _is_standard_normal(n.target, n.args, n.kwargs)]
    stand_ins: list[fx.Node] = []
    for draw in draws:
        with graph.inserting_before(batch_start):
            stand_ins.append(graph.placeholder(f"draw_{len(stand_ins)}"))
        draw.replace_all_uses_with(stand_ins[-1])
        graph.erase_node(draw)
    graph.eliminate_dead_code()
    _drop_unused_draws(graph)
    places: list[slice | None] = []
    size = 0
    for draw, stand_in in zip(draws, stand_ins, strict=True):
        if not stand_in.users:
            places.append(None)
        else:
            value = draw.meta["val"]
            end = size + value.numel()
            places.append(slice(size, end))
            with graph.inserting_before(next(iter(stand_in.users))):
                part = graph.call_function(aten.slice.Tensor, (noise, 0, size, end))
                part = graph.call_function(aten.view.default, (part, list(value.shape)))
            stand_in.replace_all_uses_with(part)
            size = end
        graph.erase_node(stand_in)
    module.recompile()
    return Gradient(module, tuple(constants), tuple(places), size)


def _is_standard_normal(func: Any, args: Any, kwargs: Any) -> bool:
    if kwargs.get("generator") is not None:
        return False
    if func in {aten.normal_.default, aten.normal_functional.default}:
        given = args[1:3]
        return (*given, *(0.0, 1.0)[len(given) :]) == (0, 1)
    return func in {aten.randn.default, aten.randn_like.default}


def _drop_unused_draws(graph: fx.Graph) -> None:
    """Drop random numbers that nothing uses, unless others would then come out otherwise."""
    draws = [node for node in graph.nodes if is_random(node.target)]
    if not any(node.users for node in draws):
        for node in draws:
            graph.erase_node(node)
        graph.eliminate_dead_code()


def _check_nothing_is_written(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if any(written.op == "placeholder" for written in find_written(node)):
            msg = (
                f"it writes to a tensor that outlives the step ({node.target}), as batch "
                "normalisation does in training mode"
            )
            raise NotStaticError(msg)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


class _WithoutChecks(TorchFunctionMode):
    """Leave out what only looks at values to raise an error or to return a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._is_all_true:
            return True
        if func is Tensor.item:
            return args[0]
        return func(*args, **(kwargs or {}))
