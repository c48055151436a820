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
from pyro_bmr.units.structure import Structure


@dataclass(frozen=True)
class LayerCut:
    """What is cut of a layer.

    Parameters
    ----------
    name : str
        Of the layer.
    kind : str
        ``"unit"``, ``"channel"``, ``"head"`` or ``"input"``.
    before, after : int
        How many units it had, and has.
    notes : mapping
        How many of its units stay though all that produces them from the units before is pruned,
        or though nothing needs them, by the reason; and how many went with live elements.

    Examples
    --------
    >>> LayerCut("fc1.weight", "unit", 300, 20, {}).after
    20
    """

    name: str
    kind: str
    before: int
    after: int
    notes: Mapping[str, int]


LAST = "last of its layer"
BIAS_LIVES = "constant: its bias lives"
CONSTANT = "constant activation"
UNREAD = "unread, with live elements"
UNUSED = "unused, kept: inputs=True removes them"
PLATE = "its plate has other units"


def choose_units(
    structure: Structure,
    needed: Tensor,
    masks: Mapping[str, Tensor],
    sites: Iterable[Site],
    *,
    inputs: bool,
) -> tuple[Tensor, tuple[LayerCut, ...]]:
    """Choose the units that go.

    Parameters
    ----------
    structure : Structure
        The units of the model.
    needed : Tensor
        Boolean, by label, False for those that can go.
    masks : mapping
        By site, False where it is exactly zero in every draw.
    sites : iterable of Site
        The latent sites, with their plates.
    inputs : bool
        Whether unused inputs go.

    Returns
    -------
    stays : Tensor
        Boolean, by label.
    layers : tuple of LayerCut
        One a layer.

    Examples
    --------
    >>> from pyro_bmr.units.structure import Axis, Layer
    >>> units = torch.arange(3)
    >>> axes = {"w": (Axis(units, False),)}
    >>> layers = (Layer("w", "unit", units),)
    >>> found = Structure(axes, {}, layers, {})
    >>> choose_units(found, units > 0, {}, (), inputs=False)[0]
    tensor([False,  True,  True])
    """
    stays = needed.clone()
    reasons: dict[int, str] = {}
    for layer in structure.layers:
        if layer.kind == "input" and not inputs:
            reasons |= {int(unit): UNUSED for unit in layer.units[~stays[layer.units]]}
            stays[layer.units] = True
        elif not stays[layer.units].any():
            first = int(layer.units[0])
            stays[first] = True
            reasons[first] = LAST
    _keep_plates_whole(structure, sites, stays, reasons)
    live = _Live(structure, masks, len(needed))
    layers = []
    for layer in structure.layers:
        kept = stays[layer.units]
        notes = [reasons[int(unit)] for unit in layer.units if int(unit) in reasons]
        idle = live.mixed & ~live.produced & needed
        constant = layer.units[kept & idle[layer.units]]
        if layer.kind != "input":
            notes += [BIAS_LIVES if live.shifted[unit] else CONSTANT for unit in constant]
            notes += [UNREAD for unit in layer.units[~kept] if live.anything[unit]]
        counts = {note: notes.count(note) for note in dict.fromkeys(notes)}
        layers.append(LayerCut(layer.name, layer.kind, len(kept), int(kept.sum()), counts))
    return stays, tuple(layers)


def indices_left(
    axes: tuple[Tensor, ...], stays: Tensor, device: torch.device | str = "cpu"
) -> Indices:
    """Return what is left of a tensor.

    Parameters
    ----------
    axes : tuple of Tensor
        By axis, the labels of its units, -1 where the index cannot go.
    stays : Tensor
        Boolean, by label.
    device : torch.device or str
        Where the indices are wanted.

    Returns
    -------
    tuple
        By axis, the indices that stay, or None for all.

    Examples
    --------
    >>> indices_left((torch.tensor([0, 1, -1]),), torch.tensor([False, True]))
    (tensor([1, 2]),)
    """
    masks = mask_left(axes, stays)
    return tuple(None if mask.all() else mask.nonzero()[:, 0].to(device) for mask in masks)


def mask_left(axes: tuple[Tensor, ...], stays: Tensor) -> tuple[Tensor, ...]:
    """Tell what is left of a tensor.

    Parameters
    ----------
    axes : tuple of Tensor
        By axis, the labels of its units, -1 where the index cannot go.
    stays : Tensor
        Boolean, by label.

    Returns
    -------
    tuple of Tensor
        By axis, True for the indices that stay.

    Examples
    --------
    >>> mask_left((torch.tensor([0, 1, -1]),), torch.tensor([False, True]))
    (tensor([False,  True,  True]),)
    """
    # The label -1 is the last of all, and stays.
    with_fixed = torch.cat([stays, stays.new_ones(1)])
    return tuple(with_fixed[units] for units in axes)


def take_inputs(call: Any, inputs: Mapping[str, Indices]) -> Any:
    """Leave out of arguments what a model does not read.

    Parameters
    ----------
    call : tuple
        Arguments and keyword arguments.
    inputs : mapping
        By place, as `Compaction.inputs`.

    Returns
    -------
    tuple
        Arguments and keyword arguments.

    Examples
    --------
    >>> take_inputs(((torch.ones(2, 3),), {}), {"args[0]": (None, torch.tensor([1]))})[0][0].shape
    torch.Size([2, 1])
    """
    if not inputs:
        return call

    def cut(path: Any, leaf: Any) -> Any:
        name = input_name(path)
        return take(leaf, inputs[name]) if name in inputs and isinstance(leaf, Tensor) else leaf

    return pytree.tree_map_with_path(cut, call)


class _Live:
    """By label, whether a unit is made of others, and by live elements; shifted; not all pruned."""

    def __init__(self, structure: Structure, masks: Mapping[str, Tensor], count: int) -> None:
        self.mixed, self.produced, self.shifted, self.anything = (
            torch.zeros(count, dtype=torch.bool) for _ in range(4)
        )
        for name, axes in structure.sites.items():
            mask = masks.get(name)
            mixes = any(axis.reads for axis in axes)
            for dim, axis in enumerate(axes):
                shape = tuple(len(other.units) for other in axes)
                whole = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
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
                reasons |= {int(unit): PLATE for unit in back[~stays[back]]}
                stays[back] = True
        if int(stays.sum()) == before:
            return
