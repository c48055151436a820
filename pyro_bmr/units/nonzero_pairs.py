r"""Where the tensors of a graph may be other than zero, and what that depends on.

Each tensor stands for two of the same shape. One is positive where an element may be other than
zero, and zero where it is exactly zero for all inputs and all draws. The other is positive
everywhere, and takes the place of the element wherever a function of zero is not zero. Sums and
products of the first are positive where those of the real ones may be other than zero, and their
derivative with respect to a factor of a term is positive where, and only where, a path of such
factors leads from that term. Positive numbers are kept at one; derivatives are what counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

NonzeroPair = tuple[Tensor, Tensor]


class Pairs:
    """The pairs of the nodes of a graph, beside their values in a run.

    ``labels`` are, by name of a node, those of the units of each axis: below ``num_units``, or -1.
    """

    def __init__(
        self,
        real: Mapping[fx.Node, Any],
        labels: Mapping[str, tuple[Tensor, ...]],
        num_units: int,
    ) -> None:
        self.real, self.labels = real, labels
        self.pairs: dict[Any, Any] = {}
        like = next(
            (v for v in real.values() if isinstance(v, Tensor)), torch.zeros((), device="cpu")
        )
        self.device = like.device
        self.terms = torch.ones(num_units, dtype=torch.float64, device=self.device)
        self.terms.requires_grad_()

    def put(self, node: fx.Node, nonzero: Tensor) -> None:
        """Start from where a tensor may be other than zero."""
        value = nonzero.to(self.device, torch.float64)
        self.pairs[node] = value, torch.ones_like(value)

    def read(self, node: fx.Node) -> NonzeroPair:
        """Return the pair of a tensor; integers of the program are known, and have none."""
        if node in self.pairs:
            return self.pairs[node]
        value = (self.real[node] != 0).to(self.device, torch.float64)
        return value, torch.ones_like(value)

    def mixed(self, like: Tensor, operands: list[fx.Node]) -> NonzeroPair:
        """Depend on all of the operands, in a way that is not known."""
        everything = torch.ones((), dtype=torch.float64, device=self.device)
        for operand in operands:
            for _, positive in _all_pairs(self.pairs[operand]):
                if positive.numel():
                    everything = everything + positive.mean()
        value = scaled(everything).expand(like.shape)
        return value, value

    def apply(self, node: fx.Node, which: int, function: Any = None) -> Any:
        """Run an operation, or a function, on one tensor of each operand's pair; integers stay."""

        def read(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            real = self.real[argument]
            paired = argument in self.pairs and (
                not isinstance(real, Tensor) or real.is_floating_point()
            )
            return self.pairs[argument][which] if paired else real

        args, kwargs = pytree.tree_map(read, (node.args, dict(node.kwargs)))
        target: Any = node.target
        return (function or target)(*args, **kwargs)

    def weighted(self, node: fx.Node, dims: list[int]) -> Tensor:
        """Multiply the first of a pair by the terms of units, along axes that are summed over."""
        value = self.read(node)[0]
        if node.name not in self.labels:  # a constant of the program
            return value
        for dim in dims:
            units = self.labels[node.name][dim].to(self.device)
            if (units >= 0).any():
                scale = torch.where(units >= 0, self.terms[units.clamp(min=0)], 1)
                shape = [1] * value.dim()
                shape[dim] = -1
                value = value * scale.reshape(shape)
        return value


def unknown(run: Pairs, node: fx.Node) -> Any:
    """Take any element of the result to depend on all operands."""
    operands = [n for n in node.all_input_nodes if n in run.pairs]
    value = run.real[node]
    if isinstance(value, tuple | list):
        return [run.mixed(v, operands) if isinstance(v, Tensor) else None for v in value]
    return run.mixed(value, operands) if isinstance(value, Tensor) else None


def scaled(value: Tensor) -> Tensor:
    """Bring positive numbers to one, with derivatives that are positive where they were."""
    return value / torch.where(value > 0, value, 1).detach()


def _all_pairs(value: Any) -> Iterator[NonzeroPair]:
    if isinstance(value, list):
        yield from (part for part in value if part is not None)
    elif value is not None:
        yield value
