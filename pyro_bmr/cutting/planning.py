"""Which units go, and what of each tensor is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.graphs.capture import input_name
from pyro_bmr.programs.sites import Indices, Site, take
from pyro_bmr.units.producers_and_readers import HELD, Structure


@dataclass(frozen=True)
class LayerCut:
    """What is cut of a layer: how many units it had, and has.

    ``notes`` counts by reason the units that stay though all that produces them is pruned, or
    though nothing needs them, and those that went with live elements.
    """

    name: str
    kind: str
    before: int
    after: int
    notes: Mapping[str, int]


_LAST = "last of its layer"
_BIAS_LIVES = "constant: its bias lives"
_CONSTANT = "constant activation"
_UNREAD = "unread, with live elements"
_UNUSED = "unused, kept: inputs=True removes them"
_PLATE = "its plate has other units"
_HELD = f"kept: {HELD}"
_MERGED = "unused, kept: a view merges the axes of the argument"


def choose_units(
    structure: Structure,
    needed: Tensor,
    masks: Mapping[str, Tensor],
    sites: Iterable[Site],
    *,
    inputs: bool,
) -> tuple[Tensor, tuple[LayerCut, ...]]:
    """Choose the units that go: by label, whether each stays, and a `LayerCut` per layer.

    ``needed`` is by label, and ``masks`` are False where a site is exactly zero in every draw.
    Unused inputs go if ``inputs``.
    """
    stays = needed.clone()
    reasons: dict[int, str] = {}
    for held, reason in ((structure.held, _HELD), (structure.merged_inputs, _MERGED)):
        reasons |= dict.fromkeys(held[~stays[held]].tolist(), reason)
        stays[held] = True
    for layer in structure.layers:
        if layer.kind == "input" and not inputs:
            reasons |= {int(unit): _UNUSED for unit in layer.units[~stays[layer.units]]}
            stays[layer.units] = True
        elif not stays[layer.units].any():
            first = int(layer.units[0])
            stays[first] = True
            reasons[first] = _LAST
    _keep_plates_whole(structure, sites, stays, reasons)
    live = _Live(structure, masks, len(needed))
    layers = []
    for layer in structure.layers:
        kept = stays[layer.units]
        notes = [reasons[int(unit)] for unit in layer.units if int(unit) in reasons]
        idle = live.mixed & ~live.produced & needed
        constant = layer.units[kept & idle[layer.units]]
        if layer.kind != "input":
            notes += [_BIAS_LIVES if live.shifted[unit] else _CONSTANT for unit in constant]
            notes += [_UNREAD for unit in layer.units[~kept] if live.anything[unit]]
        counts = {note: notes.count(note) for note in dict.fromkeys(notes)}
        layers.append(LayerCut(layer.name, layer.kind, len(kept), int(kept.sum()), counts))
    return stays, tuple(layers)


def indices_left(
    axes: tuple[Tensor, ...], stays: Tensor, device: torch.device | str = "cpu"
) -> Indices:
    """Return the indices that are left of a tensor: see `mask_left`."""
    masks = mask_left(axes, stays)
    return tuple(None if mask.all() else mask.nonzero()[:, 0].to(device) for mask in masks)


def mask_left(axes: tuple[Tensor, ...], stays: Tensor) -> tuple[Tensor, ...]:
    """Tell which indices of each axis are left, from the labels of its units, -1 where fixed."""
    # The label -1 is the last of all, and stays.
    with_fixed = torch.cat([stays, stays.new_ones(1)])
    return tuple(with_fixed[units] for units in axes)


def take_inputs(call: Any, inputs: Mapping[str, Indices]) -> Any:
    """Leave out of the arguments and keywords of a call what a model does not read, by place."""
    if not inputs:
        return call

    def cut(path: Any, leaf: Any) -> Any:
        name = input_name(path)
        return take(leaf, inputs[name]) if name in inputs and isinstance(leaf, Tensor) else leaf

    return pytree.tree_map_with_path(cut, call)


class _Live:
    """What makes a unit, by label.

    ``mixed``: a site that reads other units; ``produced``: live elements of one; ``shifted``: live
    elements of one that reads none, as a bias; ``anything``: live elements of any masked site.
    """

    def __init__(self, structure: Structure, masks: Mapping[str, Tensor], count: int) -> None:
        self.mixed, self.produced, self.shifted, self.anything = (
            torch.zeros(count, dtype=torch.bool, device="cpu") for _ in range(4)
        )
        for name, axes in structure.sites.items():
            mask = masks.get(name)
            mixes = any(axis.reads for axis in axes)
            for dim, axis in enumerate(axes):
                shape = tuple(len(other.units) for other in axes)
                whole = torch.ones(shape, dtype=torch.bool, device="cpu")
                whole = whole if mask is None else mask.cpu()
                rest = [other for other in range(len(axes)) if other != dim]
                alive = whole.any(rest) if rest else whole
                labels = axis.units[alive & (axis.units >= 0)]
                if name in masks:
                    self.anything[labels] = True
                if mixes and not axis.reads:
                    self.mixed[axis.units[axis.units >= 0]] = True
                if not axis.reads:
                    (self.produced if mixes else self.shifted)[labels] = True


def _keep_plates_whole(
    structure: Structure, sites: Iterable[Site], stays: Tensor, reasons: dict[int, str]
) -> None:
    """Keep units until all sites in a plate lose the same indices."""
    axes: dict[str, list[Tensor]] = {}
    for site in sites:
        for frame in site.plates:
            dim = None if frame.dim is None else frame.dim - site.event_dim
            if dim is not None and -dim <= len(site.shape) and site.name in structure.sites:
                axes.setdefault(frame.name, []).append(structure.sites[site.name][dim].units)
    while True:
        before = int(stays.sum())
        for plated in axes.values():
            left = torch.stack([mask_left((units,), stays)[0] for units in plated])
            stay = left.any(0)
            for units in plated:
                back = units[stay]
                back = back[back >= 0]
                reasons |= {int(unit): _PLATE for unit in back[~stays[back]]}
                stays[back] = True
        if int(stays.sum()) == before:
            return
