"""A model at given values of its latent sites, recorded as a graph of torch operations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pyro_bmr.export.outputs import find_output
from pyro_bmr.graphs.operations import find_aliases, find_written
from pyro_bmr.programs.calls import Call
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import ValueMessenger, refuse


def run(
    model: Callable[..., Any],
    values: Mapping[str, Tensor],
    call: Call,
    inputs: Sequence[Tensor],
    output: str | None,
) -> Any:
    """Run a model at values of its latent sites and inputs; return what `find_output` finds."""
    with dry_run(model), torch.no_grad():
        return _run(model, values, call, inputs, output)


def record(
    model: Callable[..., Any],
    values: Mapping[str, Tensor],
    call: Call,
    inputs: Sequence[Tensor],
    output: str | None,
    *,
    decompose: bool = False,
) -> fx.GraphModule:
    """Record what `run` does, as a function of the values, then of the inputs, all tensors.

    With ``decompose`` operations are simpler and write nothing in place, as `record_many` needs.
    """
    found: list[Any] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        here = dict(zip(values, tensors, strict=False))
        result = _run(model, here, call, tensors[len(values) :], output)
        leaves, spec = pytree.tree_flatten(result)
        found[:] = leaves, spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    if decompose:
        flat = torch.func.functionalize(flat)
    # Before dispatch, operations are still those that people know: linear, conv2d, layer_norm.
    recorder = make_fx(flat, tracing_mode="real", pre_dispatch=not decompose)
    attention = sdpa_kernel(SDPBackend.MATH) if decompose else nullcontext()
    with attention, dry_run(model), torch.no_grad():
        graph = recorder(*values.values(), *inputs)
    _nest_output(graph, *found)
    graph = _simplify(graph)
    if decompose:
        _allow_batches(graph)
    return graph


def record_many(module: fx.GraphModule, values: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
    """Record the batched operations that do what a graph does at many values in turn.

    The graph was recorded with ``decompose``. Values and outputs have a leading axis for the draws.
    """
    found: list[Any] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(module(*tensors))
        found[:] = leaves, spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    in_dims = (*(0 for _ in values), *(None for _ in inputs))
    batched = torch.vmap(flat, in_dims, randomness="different")
    with torch.no_grad():
        graph = make_fx(batched, tracing_mode="real")(*values, *inputs)
    _nest_output(graph, *found)
    return _simplify(graph)


def _simplify(module: fx.GraphModule) -> fx.GraphModule:
    """Leave out of a recorded graph, in place, what its output does not need; not placeholders."""
    graph = module.graph
    for node in graph.nodes:
        # In training a batch norm takes the statistics of the batch, and updates its own.
        if node.target in _BATCH_NORMS and node.args[5]:
            node.args = (*node.args[:3], None, None, *node.args[5:])
        # A recording has no gradients to cut off.
        if node.target in _DETACH:
            node.replace_all_uses_with(node.args[0])
    needed = _find_needed(graph)
    for node in reversed(list(graph.nodes)):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)
    module.recompile()
    return module


def _run(
    model: Callable[..., Any],
    values: Mapping[str, Tensor],
    call: Call,
    inputs: Sequence[Tensor],
    output: str | None,
) -> Any:
    args, kwargs = call.arguments(inputs)
    with ValueMessenger(values, refuse("sites that do not depend on the number of data")):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        return find_output(trace.nodes["_RETURN"]["value"], trace.nodes, values, output)


_aten = torch.ops.aten
_DETACH = {_aten.detach.default, _aten.detach_.default}
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_BATCH_NORMS = {_aten.batch_norm.default, _aten.native_batch_norm.default}


def _nest_output(module: fx.GraphModule, leaves: list[Any], spec: Any) -> None:
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    nodes = iter(output.args[0])
    full = [next(nodes) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    output.args = (pytree.tree_unflatten(full, spec),)
    # What make_fx returns takes and gives flat lists; this takes and gives what the graph says.
    module.graph.set_codegen(fx.graph.CodeGen())


def _allow_batches(module: fx.GraphModule) -> None:
    """Replace what a batch of draws cannot do, or would do one by one."""
    graph = module.graph
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = _aten.reshape.default
        if node.target is _aten.copy.default:
            place, source = node.args[:2]
            with graph.inserting_before(node):
                cast = graph.call_function(_aten.type_as.default, (source, place))
                full = graph.call_function(_aten.expand_as.default, (cast, place))
            node.replace_all_uses_with(full)
            graph.erase_node(node)
    module.recompile()


def _find_needed(graph: fx.Graph) -> set[fx.Node]:
    """Go from the output back, through values and through what is written to them in place."""
    nodes = [node for node in graph.nodes if node.target is not torch._C._set_grad_enabled]
    ahead, needed = [nodes[-1]], set[fx.Node]()
    while ahead:
        node = ahead.pop()
        if node not in needed:
            needed.add(node)
            ahead += node.all_input_nodes
        if not ahead:
            held = {_home(n) for n in needed}
            writers = [n for n in nodes if n not in needed and find_written(n)]
            ahead += [n for n in writers if not held.isdisjoint(map(_home, find_written(n)))]
    return needed


def _home(node: fx.Node) -> Any:
    """Return the node, or the name of the constant, whose memory a node looks into."""
    while node.op == "call_function":
        if node.target is operator.getitem:
            sources = node.all_input_nodes[:1]
        else:
            sources = find_aliases(node)
        if not sources:
            break
        node = sources[0]
    return node.target if node.op == "get_attr" else node
