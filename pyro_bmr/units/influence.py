"""Which units have an influence on what a model is for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from typing_extensions import override

from pyro_bmr.graphs.capture import Capture
from pyro_bmr.graphs.operations import is_in_place, is_random, name_operation
from pyro_bmr.units.nonzero import NONZERO_RULES
from pyro_bmr.units.nonzero_pairs import Pairs, unknown
from pyro_bmr.units.producers_and_readers import Axis, Structure


def find_needed(
    capture: Capture,
    inputs: Sequence[Tensor],
    structure: Structure,
    masks: Mapping[str, Tensor],
) -> Tensor:
    """Tell, by label, which units cannot go without changing what the model computes."""
    return _find_influence(capture, _read_values(capture, inputs), structure, masks)


def _find_influence(
    capture: Capture,
    real: Mapping[fx.Node, Any],
    structure: Structure,
    masks: Mapping[str, Tensor],
) -> Tensor:
    """Tell which units have an influence where sites are exactly zero wherever their mask is False.

    A unit is needed where it is summed over, in a product of matrices or a convolution. There it
    is multiplied by a number; the derivative of outputs with respect to that is zero if its term
    is exactly zero, or if nothing depends on the sum. See `pyro_bmr.units.nonzero_pairs`.
    """
    num_units = sum(len(layer.units) for layer in structure.layers)
    run = _Run(real, structure, num_units)
    run.start(capture, masks)
    for node in capture.graph.graph.nodes:
        run.visit(node)
    ends = [node for _, node in capture.outputs]
    ends += [node for nodes in capture.priors.values() for node in nodes]
    total = sum(
        (run.pairs[node][0].sum() for node in ends if node in run.pairs),
        torch.zeros((), device="cpu"),
    )
    if not isinstance(total, Tensor) or not total.requires_grad:
        return torch.zeros(num_units, dtype=torch.bool, device="cpu")
    (influence,) = torch.autograd.grad(total, [run.terms])
    return influence.cpu() > 0


def find_released(
    capture: Capture, inputs: Sequence[Tensor], structure: Structure, sites: Collection[str]
) -> Tensor:
    """Tell, by label, which units nothing needs once what reads them, in ``sites``, is zero.

    Never inputs, which nothing produces. Half of a layer is looked at while the other half is read,
    so that a unit that other units of its layer depend on is needed.
    """
    real = _read_values(capture, inputs)
    released = torch.zeros(
        sum(len(layer.units) for layer in structure.layers), dtype=torch.bool, device="cpu"
    )
    produced = [layer.units for layer in structure.layers if layer.kind != "input"]
    for units in [half for layer in produced for half in (layer[::2], layer[1::2])]:
        masks = {name: ~_reads(structure.sites[name], units) for name in sites}
        released[units] = ~_find_influence(capture, real, structure, masks)[units]
    return released


def _reads(axes: Sequence[Axis], units: Tensor) -> Tensor:
    """Tell which elements of a site read one of some units."""
    found = torch.zeros([len(axis.units) for axis in axes], dtype=torch.bool, device="cpu")
    for i, axis in enumerate(axes):
        if axis.reads:
            found |= torch.isin(axis.units, units).reshape(-1, *[1] * (len(axes) - i - 1))
    return found


class _Run(Pairs):
    """One pass through the graph."""

    def __init__(self, real: Mapping[fx.Node, Any], structure: Structure, num_units: int) -> None:
        super().__init__(real, structure.nodes, num_units)
        self.roots: dict[fx.Node, fx.Node] = {}

    def start(self, capture: Capture, masks: Mapping[str, Tensor]) -> None:
        for name, node in capture.sites.items():
            value = self.real[node]
            mask = masks.get(name)
            self.put(node, torch.ones_like(value) if mask is None else mask.expand(value.shape))
        for node in capture.inputs.values():
            self.put(node, torch.ones_like(self.real[node]))
        for name, node in capture.tensors.items():
            original = capture.originals[name].detach()
            trained = capture.originals[name].requires_grad
            if original.is_floating_point():
                self.put(node, torch.ones_like(original) if trained else original != 0)

    def visit(self, node: fx.Node) -> None:
        if node in self.pairs or node.op not in {"call_function", "get_attr"}:
            return
        operands = [n for n in node.all_input_nodes if n in self.pairs]
        value = self.real.get(node)
        if not operands:
            # Integers of the program are known; those that are drawn are not.
            drawn = is_random(node.target)
            if isinstance(value, Tensor) and (drawn or value.is_floating_point()):
                self.put(node, torch.ones_like(value) if drawn else value != 0)
            return
        if name_operation(node) == "getitem":
            parent, index = (cast(Any, argument) for argument in node.args)
            whole = self.pairs[parent]
            part = whole[index] if isinstance(whole, list) else None
            self.pairs[node] = unknown(self, node) if part is None else part
            return
        self.pairs[node] = NONZERO_RULES.get(name_operation(node), unknown)(self, node)
        self._share(node, operands)

    def _share(self, node: fx.Node, operands: list[fx.Node]) -> None:
        """After an operation in place, know nothing of the tensors that share its memory."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return
        written = is_in_place(node.target)
        if written or getattr(node.target, "is_view", False):
            root = self.roots[node] = self.roots.get(first, first)
            if written:
                for other in [root, *(n for n, r in self.roots.items() if r is root)]:
                    if other is not node and other in self.pairs:
                        self.pairs[other] = self.mixed(self.real[other], [other, *operands])


class _Values(fx.Interpreter):
    """Runs the graph again, and leaves what it writes to as it was."""

    def __init__(self, capture: Capture) -> None:
        super().__init__(capture.graph)
        self.values: dict[fx.Node, Any] = {}

    @override
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in {"get_attr", "placeholder"}:
            result = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), result)
        # What later gives the tensor another shape in place leaves this one as it is.
        self.values[n] = pytree.tree_map_only(Tensor, Tensor.detach, result)
        return result


def _read_values(capture: Capture, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Run the graph at the values of its sites, followed by the tensors of its arguments."""
    run = _Values(capture)
    with torch.no_grad(), torch.random.fork_rng():
        run.run(*inputs)
    return run.values
