"""Guides that compute a posterior from what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_bmr.guides.guide_reader import GuideReader
from pyro_bmr.guides.pruned_guide import Origin


def follow_arguments(origin: Origin) -> tuple[list[Tensor], Origin]:
    """Copy the arguments, so that gradients lead to them."""
    leaves: list[Tensor] = []

    def follow(value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.requires_grad:
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map_only(Tensor, follow, (origin.args, dict(origin.kwargs)))
    return leaves, replace(origin, args=args, kwargs=kwargs)


def _turn_over(origin: Origin) -> Origin:
    """Put the rows of whole numbers, to which no gradient leads, in another order."""

    def turn(value: Tensor) -> Tensor:
        return value if value.is_floating_point() or not value.dim() else value.flip(0)

    args, kwargs = tree_map_only(Tensor, turn, (origin.args, dict(origin.kwargs)))
    return replace(origin, args=args, kwargs=kwargs)


def find_given(
    first: GuideReader, leaves: list[Tensor], run: Callable[[Origin], GuideReader], origin: Origin
) -> set[str]:
    """Find sites whose posterior is computed from the arguments of the guide."""
    found = {
        name
        for name, statement in first.statements.items()
        if _leads_to(leaves, (statement.loc, *statement.spread))
    }
    changed = _find_changed(first, run(_turn_over(origin)))
    # What changes from run to run says nothing of the arguments.
    return found | (changed - _find_changed(first, run(origin)) if changed else changed)


def _find_changed(first: GuideReader, other: GuideReader) -> set[str]:
    changed = set()
    for name, statement in first.statements.items():
        both = zip(*((s.loc, *s.spread) for s in (statement, other.statements[name])), strict=True)
        if not all(torch.equal(one, two) for one, two in both):
            changed.add(name)
    return changed


def _leads_to(leaves: list[Tensor], tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether any of some tensors was computed from any of the leaves."""
    tensors = tuple(tensor for tensor in tensors if tensor.requires_grad)
    if not leaves or not tensors:
        return False
    total = torch.stack([tensor.sum() for tensor in tensors]).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return any(one is not None for one in found)
