"""Which indices of which tensors are the same unit: the rules, applied to a whole graph.

Every index of every axis of every tensor gets a label. An operation joins labels: a sum of two
tensors those of its operands, a product of matrices those that it sums over. What is connected is
one unit. Outputs are protected, and what a mean, a softmax, a look-up or an operation that has no
rule needs whole.

A view that splits an axis leaves whole blocks (heads) as units. Where a tensor is used in two
roles, an axis that is produced in one and read in the other counts as produced.

Compare Fang et al. (2023), arXiv:2301.12900, sec. 3, whose graph joins layers, not indices.

>>> import pyro
>>> import pyro.distributions as dist
>>> from pyro_bmr.graphs.capture import capture
>>> def model(x):
...     w1 = pyro.sample("w1", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
...     w2 = pyro.sample("w2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
...     return (x @ w1).tanh() @ w2
>>> values = {"w1": torch.ones(3, 2), "w2": torch.ones(2)}
>>> structure = find_structure(capture(model, (torch.ones(4, 3),), {}, values))
>>> structure.sites["w1"][1].units, structure.sites["w2"][0].units
(tensor([3, 4]), tensor([3, 4]))
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_bmr.graphs.capture import Capture
from pyro_bmr.graphs.operations import find_written, read_arguments
from pyro_bmr.units.components import find_components
from pyro_bmr.units.contractions import CONTRACTIONS
from pyro_bmr.units.indexing import INDEXING
from pyro_bmr.units.labelled import AxisOrigin, Labelled
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.layers import UnitLabelling, write_structure
from pyro_bmr.units.operation_calls import (
    CONSTANT_ALONG,
    ELEMENTWISE,
    OperationCall,
    Rule,
    broadcast,
    combine,
    create_sequence,
    protect_all,
)
from pyro_bmr.units.producers_and_readers import Structure
from pyro_bmr.units.reductions import REDUCTIONS
from pyro_bmr.units.views import VIEWS


def find_structure(captured: Capture) -> Structure:
    """Find the units of a model, and all indices of its sites that produce or read each.

    Passes again, with other parts of split axes as units, while blocks are used by position.
    Warns of operations that have no rule where axes of sites are protected for them.
    """
    decisions: dict[Hashable, int] = {}
    while True:
        labelling = _Pass(captured, Labels(decisions)).run()
        moved = labelling.labels.moved
        if not moved:
            structure = write_structure(labelling, find_components(labelling.labels))
            return replace(structure, held=_find_held(captured, structure.nodes))
        decisions = decisions | {name: decisions.get(name, 0) + 1 for name in moved}


def _find_held(captured: Capture, units: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
    """Find the units of what a module is called with that checks its sizes."""
    calls = (call for call in captured.sized if call.checks_sizes)
    found = [axis for call in calls for node in call.operands for axis in units.get(node.name, ())]
    held = torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *found]).unique()
    return held[held >= 0]


LABEL_RULES: dict[Any, Rule] = ELEMENTWISE | VIEWS | CONTRACTIONS | INDEXING | REDUCTIONS
"""By operation, what it does to labels; those that torch marks as elementwise need no entry."""


@dataclass
class _Pass:
    """One pass through the graph."""

    captured: Capture
    labels: Labels
    known: dict[fx.Node, Any] = field(default_factory=dict)
    owners: list[tuple[str, int]] = field(default_factory=list)

    def run(self) -> UnitLabelling:
        captured = self.captured
        self._start()
        for node in captured.graph.graph.nodes:
            if node in self.alive and node.op == "call_function":
                self.known[node] = self._apply(node)
        inherited: dict[int, set[int]] = {}
        for name, nodes in captured.priors.items():
            for node in nodes:
                self._join_prior(self.known[captured.sites[name]], self.known[node], inherited)
        for name, count in captured.tied.items():
            for axis in self.known[captured.sites[name]].axes[-count:] if count else ():
                self.labels.protect(axis, "its prior is not elementwise")
        for _, node in captured.outputs:
            self.labels.outputs += self.known[node].axes
        sites, tensors, inputs = (
            {name: self.known[node] for name, node in nodes.items()}
            for nodes in (captured.sites, captured.tensors, captured.inputs)
        )
        known = {n.name: x for n, x in self.known.items() if isinstance(x, Labelled)}
        return UnitLabelling(self.labels, sites, tensors, inputs, self.owners, inherited, known)

    def _start(self) -> None:
        captured = self.captured
        for nodes, origin in (
            (captured.sites, AxisOrigin.SITE),
            (captured.tensors, AxisOrigin.TENSOR),
            (captured.inputs, AxisOrigin.INPUT),
        ):
            for name, node in nodes.items():
                made = self.labels.create(node.meta["val"].shape, origin)
                if origin != AxisOrigin.INPUT:
                    first = len(self.owners)
                    self.owners += [(name, i) for i in range(len(made.axes))]
                    places = range(first, len(self.owners))
                    made = replace(made, sources=tuple(frozenset([i]) for i in places))
                if isinstance(captured.originals.get(name), nn.Parameter):
                    made = replace(made, depth=0.0)
                self.known[node] = made
        for node in captured.graph.graph.find_nodes(op="get_attr"):
            if node not in self.known:
                made = self.labels.create(node.meta["val"].shape)
                for axis in made.axes:
                    self.labels.protect(axis, CONSTANT_ALONG)
                self.known[node] = made
        self.alive = _find_alive(captured)

    def _apply(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            whole, i = node.args
            return self.known[whole][i]  # type: ignore[index]
        value = node.meta.get("val")
        results = value if isinstance(value, list | tuple) else [value]
        shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else () for x in results)
        call = OperationCall(node.name, str(node.target), _bind(node, self.known), shapes)
        return _find_rule(node.target, call)(self.labels, call)

    def _join_prior(
        self, value: Labelled, parameter: Labelled, inherited: dict[int, set[int]]
    ) -> None:
        try:
            fits = torch.broadcast_shapes(value.shape, parameter.shape) == value.shape
        except RuntimeError:
            fits = False
        if not fits:
            for axis in (*value.axes, *parameter.axes):
                self.labels.protect(axis, "its prior is not elementwise")
            return
        broadcast(self.labels, [value, parameter], value.shape)
        for i in range(-len(parameter.axes), 0):
            for source in parameter.sources[i]:
                inherited.setdefault(source, set()).update(value.sources[i])


def _find_alive(captured: Capture) -> set[fx.Node]:
    """Find what outputs, priors, and operations in place depend on, and what checks sizes."""
    nodes = captured.graph.graph.nodes
    ahead = [node for _, node in captured.outputs]
    ahead += [node for found in captured.priors.values() for node in found]
    ahead += [n for n in nodes if find_written(n)]
    ahead += [n for n in nodes if getattr(n.target, "overloadpacket", None) in CONTRACTIONS]
    alive: set[fx.Node] = set()
    while ahead:
        node = ahead.pop()
        if node not in alive:
            alive.add(node)
            ahead += node.all_input_nodes
    return alive


def _bind(node: fx.Node, known: dict[fx.Node, Any]) -> dict[str, Any]:
    """Name the arguments of an operation, with defaults, and label those that are tensors."""
    numbered = {str(i): value for i, value in enumerate((*node.args, *node.kwargs.values()))}
    named = read_arguments(node) or numbered
    return {name: fx.map_arg(value, known.__getitem__) for name, value in named.items()}


def _find_rule(target: Any, call: OperationCall) -> Rule:
    rule = LABEL_RULES.get(getattr(target, "overloadpacket", None))
    if rule is not None:
        return rule
    if not call.tensors:
        return create_sequence
    return combine if torch.Tag.pointwise in getattr(target, "tags", ()) else protect_all
