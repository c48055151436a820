"""A recorded graph and its weights, put together as one module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, fx, nn

from pyro_bmr.graphs.operations import is_random, read_arguments
from pyro_bmr.programs.dry_run import find_modules
from pyro_bmr.programs.handlers import module_key


class RandomOutputError(ValueError):
    """The output of a model depends on random numbers."""


def assemble_module(
    recorded: fx.GraphModule,
    values: Mapping[str, Tensor],
    names: Sequence[str],
    model: Callable[..., Any],
) -> tuple[fx.GraphModule, list[bool]]:
    """Make a module of a recorded graph, and tell for each input whether the module takes it.

    The graph is a function of ``values``, by latent site, which become parameters of these names,
    and then of the inputs, ``names``. Parameters and buffers of ``model`` keep their names; values
    of ``pyro.param`` have theirs, with ``_unconstrained`` after it where they are transformed. The
    module shares no tensor with others, and makes its inputs contiguous, as views need that were
    recorded. Output that is random raises a `RandomOutputError`.
    """
    random = [n for n in recorded.graph.nodes if _is_random(n)]
    if random:
        msg = (
            f"the output depends on random numbers ({', '.join(str(n.target) for n in random)}). "
            "Expected one that the latent sites of the guide determine: set dropout to "
            "evaluation, model.eval(); give subsample= to plates; and let the guide hold all "
            "latent sites that the prediction needs"
        )
        raise RandomOutputError(msg)
    root, graph = nn.Module(), fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    paths = dict[str, str]()
    known = _named_tensors(model)
    placeholders = [node for node in recorded.graph.nodes if node.op == "placeholder"]
    used = [bool(node.users) for node in placeholders[len(values) :]]
    for node, name in zip(placeholders[len(values) :], names, strict=True):
        if node.users:
            places[node] = graph.placeholder(name)
    for node, given in list(places.items()):
        places[node] = graph.call_function(torch.ops.aten.contiguous.default, (given,))
    for node, (name, value) in zip(placeholders, values.items(), strict=False):
        if node.users:
            places[node] = graph.get_attr(_hold(root, name, nn.Parameter(_copy(value))))
    for node in recorded.graph.nodes:
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(recorded)
            if node.target not in paths:
                name = known.get(id(tensor), f"constant_{len(paths)}")
                held = _copy(tensor)
                if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
                    held = nn.Parameter(held, tensor.requires_grad)
                paths[node.target] = _hold(root, name, held)
            places[node] = graph.get_attr(paths[node.target])
        elif node.op != "placeholder":
            places[node] = graph.node_copy(node, places.__getitem__)
            places[node].meta = {}
    return fx.GraphModule(root, graph, "PlainNetwork"), used


def _named_tensors(model: Callable[..., Any]) -> dict[int, str]:
    """Name tensors as the innermost module does, or else the param store."""
    names: dict[int, str] = {}
    store = pyro.get_param_store()
    for name, unconstrained in store.named_parameters():
        plain = store[name] is unconstrained
        names[id(unconstrained)] = name if plain else f"{name}_unconstrained"
    for module in find_modules(model):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            names[id(tensor)] = min(names.get(id(tensor), name), name, key=len)
    return names


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _hold(root: nn.Module, name: str, tensor: Tensor) -> str:
    """Register a tensor under its dotted name, or under another if that is taken."""
    *path, last = name.split(".")
    owner: Any = root
    for key in path:
        if key and not hasattr(owner, key):
            owner.add_module(key, nn.Module())
        owner = getattr(owner, key, None) if key else None
    if type(owner) is not nn.Module or not last or hasattr(owner, last):
        owner, path, last = root, [], module_key(name)
        while hasattr(owner, last):
            last += "_"
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor)
    return ".".join([*path, last])


def _is_random(node: fx.Node) -> bool:
    if not is_random(node.target):
        return False
    named = read_arguments(node)
    # Dropout, also inside attention and recurrent networks, that is off.
    off = [named.get(key, True) for key in ("train", "training", "p", "dropout_p", "dropout")]
    return all(off)
