"""A model as a graph of tensor operations, from the values of its sites to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, fx
from torch.distributions.constraints import real
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from pyro_bmr.graphs.sized_calls import SizedCall, SizedCalls
from pyro_bmr.programs.distributions import find_core
from pyro_bmr.programs.dry_run import dry_run, find_modules
from pyro_bmr.programs.given_values import ValueMessenger, take_rows
from pyro_bmr.programs.model_runs import find_tensors
from pyro_bmr.programs.site_kinds import is_deterministic, is_reparameterized


def capture(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
) -> Capture:
    """Run a model at given values of its latent sites, and write down what it computes.

    Values are on the support, at the full size of the plates. Tensors among the arguments, in any
    nesting, become inputs. Raises RuntimeError if the model does not run with these arguments, or
    if which operations it runs depends on the values of tensors.
    """
    paths, structure = pytree.tree_flatten_with_path((args, dict(kwargs)))
    leaves = [leaf for _, leaf in paths]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    run = _Run()

    def program(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(values, tensors, strict=False))
        flat = list(leaves)
        for place, tensor in zip(places, tensors[len(values) :], strict=True):
            flat[place] = tensor
        own_args, own_kwargs = pytree.tree_unflatten(flat, structure)
        with SizedCalls(run.record_sized), _Sites(given, run):
            run.returned(model(*own_args, **own_kwargs))
        return run.found

    tensors = [value.detach() for value in values.values()] + [leaves[i] for i in places]
    names = _TensorNames(model)
    try:
        with dry_run(model), _decomposed(), names.of_modules_that_run():
            graph = make_fx(program, tracing_mode="real")(*tensors)
            names.add(dict(pyro.get_param_store().named_parameters()))
            supports = pyro.get_param_store().get_state()["constraints"]
    except Exception as error:
        msg = (
            f"the model could not be captured ({type(error).__name__}: {error}). Expected it to "
            "run with the arguments of the guide's first call, or with those given, and to run "
            "the same operations whatever the values of its tensors are"
        )
        raise RuntimeError(msg) from error
    placeholders = graph.graph.find_nodes(op="placeholder")
    sites = dict(zip(values, placeholders, strict=False))
    lifted = _share_tensors(graph)
    from_sites = set(sites.values())
    for node in graph.graph.nodes:
        if not from_sites.isdisjoint(node.all_input_nodes):
            from_sites.add(node)
    return Capture(
        graph,
        sites,
        dict(
            zip((input_name(paths[i][0]) for i in places), placeholders[len(sites) :], strict=True)
        ),
        {names.find(tensor): node for node, tensor in lifted},
        {names.find(tensor): tensor for _, tensor in lifted},
        [
            (name, node)
            for name, node in run.outputs
            if node in from_sites and (node in run.observed or _is_computed(node))
        ],
        {name: found for name, found in run.priors.items() if name in sites},
        run.tied,
        run.sized,
        {name: (value, supports.get(name, real)) for name, value in run.parameters.items()},
    )


@dataclass(frozen=True)
class Capture:
    """A model as a graph of ATen operations, whose placeholders are the sites, then the inputs.

    Operations in place are left as they are: the node stands for the tensor after it. ``tensors``
    and ``originals`` are what the program finds elsewhere: parameters, buffers, entries of Pyro's
    param store (unconstrained, as in ``parameters``), constants (``constant 3``). ``outputs`` are
    computed from sites and no views of one: the tensors in distributions of observed sites, log
    factors, deterministic sites, what the model returns; of a site that `pyro.poutine.reparam`
    replaced, the log density alone. ``priors`` are the tensors in a site's
    distribution, ``tied`` how many of its last axes are not independent.
    """

    graph: fx.GraphModule
    sites: Mapping[str, fx.Node]
    inputs: Mapping[str, fx.Node]
    tensors: Mapping[str, fx.Node]
    originals: Mapping[str, Tensor]
    outputs: list[tuple[str, fx.Node]]
    priors: Mapping[str, list[fx.Node]]
    tied: Mapping[str, int]
    sized: list[SizedCall]
    parameters: Mapping[str, tuple[Tensor, Any]]


class _Run:
    """What one run under the tracer has shown."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, fx.Node]] = []
        self.observed: set[fx.Node] = set()
        self.priors: dict[str, list[fx.Node]] = {}
        self.tied: dict[str, int] = {}
        self.sized: list[SizedCall] = []
        self.found: list[Tensor] = []
        self.parameters: dict[str, Tensor] = {}

    def record_sized(self, function: Any, args: Any, kwargs: Mapping[str, Any], where: str) -> Any:
        result = function(*args, **kwargs)
        plain, plain_kwargs = pytree.tree_map_only(Tensor, lambda _: None, (args, dict(kwargs)))
        made, used = self._nodes(result), self._nodes((args, kwargs))
        self.sized.append(SizedCall(function, plain, plain_kwargs, tuple(made), tuple(used), where))
        return result

    def record_output(self, name: str, value: Any) -> None:
        self.outputs += [(name, node) for node in self._keep(value)]

    def record_observed(self, tensors: list[Tensor]) -> None:
        self.observed.update(self._nodes(tensors))

    def record_prior(self, name: str, fn: Any) -> None:
        self.priors[name] = self._keep(list(find_tensors(fn)))
        self.tied[name] = find_core(fn).event_dim

    def returned(self, value: Any) -> None:
        self.record_output("return value", value)

    def _keep(self, value: Any) -> list[fx.Node]:
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        self.found += [tensor for tensor in tensors if _find_node(tensor) is not None]
        return self._nodes(tensors)

    def _nodes(self, value: Any) -> list[fx.Node]:
        nodes = [_find_node(x) for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
        return list(dict.fromkeys(node for node in nodes if node is not None))


class _Sites(ValueMessenger):
    """Gives latent sites their values, and reads the distributions of all."""

    def __init__(self, values: Mapping[str, Tensor], run: _Run) -> None:
        super().__init__(values, take_rows)
        self.run = run

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        self.run.parameters[msg["name"]] = getattr(value, "unconstrained", lambda: value)()

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if msg["name"] in self.values and not msg["is_observed"]:
            self.run.record_prior(msg["name"], msg["fn"])
        elif is_reparameterized(msg) and not is_deterministic(msg):
            self.run.record_output(msg["name"], find_core(msg["fn"]).log_density)
        else:
            tensors = list(find_tensors(msg["fn"]))
            self.run.record_output(msg["name"], tensors)
            if not is_deterministic(msg):
                self.run.record_observed(tensors)


class _TensorNames:
    """Names of tensors, by identity."""

    def __init__(self, model: Any) -> None:
        self.by_id: dict[int, str] = {}
        self.kept: list[Tensor] = []
        self.constants = 0
        for module in find_modules(model):
            self.add_module(module)

    def add_module(self, module: torch.nn.Module, _args: Any = None) -> None:
        self.add(dict(module.named_parameters()) | dict(module.named_buffers()))

    def add(self, named: Mapping[str, Tensor]) -> None:
        taken = set(self.by_id.values())
        for name, tensor in named.items():
            if id(tensor) not in self.by_id:
                self.kept.append(tensor)
                count = sum(other.split(" (")[0] == name for other in taken)
                self.by_id[id(tensor)] = f"{name} ({count + 1})" if count else name

    @contextmanager
    def of_modules_that_run(self) -> Iterator[None]:
        hook = register_module_forward_pre_hook(self.add_module)
        try:
            yield
        finally:
            hook.remove()

    def find(self, tensor: Tensor) -> str:
        if id(tensor) not in self.by_id:
            self.add({f"constant {self.constants}": tensor})
            self.constants += 1
        return self.by_id[id(tensor)]


@contextmanager
def _decomposed() -> Iterator[None]:
    """Have attention and recurrent layers in their parts."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        mkldnn: Any = torch.backends.mkldnn.flags
        with sdpa_kernel(SDPBackend.MATH), mkldnn(enabled=False, allow_tf32=None):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _find_node(tensor: Tensor) -> fx.Node | None:
    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def _share_tensors(graph: fx.GraphModule) -> list[tuple[fx.Node, Tensor]]:
    """Leave one node for each tensor, and return both, without literals of the program."""
    first: dict[int, tuple[fx.Node, Tensor]] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr(graph, node.target)
        if id(tensor) in first:
            node.replace_all_uses_with(first[id(tensor)][0])
            graph.graph.erase_node(node)
        else:
            first[id(tensor)] = node, tensor
    graph.recompile()
    literal = torch.ops.aten.lift_fresh_copy.default
    return [
        (node, tensor)
        for node, tensor in first.values()
        if any(user.target is not literal for user in node.users)
    ]


def _is_computed(node: fx.Node) -> bool:
    while getattr(node.target, "is_view", False):
        node = node.all_input_nodes[0]
    return node.op == "call_function"


def input_name(path: Any) -> str:
    """Write ``args[0]`` for a positional argument, ``y`` for a keyword."""
    (_, *rest) = path
    if path[0].idx == 0:
        return "args" + pytree.keystr(tuple(rest))
    return str(rest[0].key) + pytree.keystr(tuple(rest[1:]))
