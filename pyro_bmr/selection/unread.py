"""Which elements nothing depends on any more, once others are zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from pyro_bmr.mathematics.transfers import to_numbers
from pyro_bmr.selection.model_units import UnitsOnDemand
from pyro_bmr.units.producers_and_readers import Axis


def find_unread(
    masks: Mapping[str, Tensor],
    releasable: Collection[str],
    known: UnitsOnDemand,
) -> dict[str, Tensor]:
    """Tell by site which elements nothing depends on once those that masks drop are zero.

    What produces a unit that nothing reads, then what reads a unit that is always zero: both belong
    to ``releasable`` sites. All others that are dropped have to be zero for that. Nothing if no
    slice of a site is dropped whole, or the units of the model are not known.
    """
    exact = {name: mask for name, mask in masks.items() if name in known.zeroed}
    if all(to_numbers([some for mask in exact.values() for some in _keep_slices(mask)])):
        return {}
    units = known.if_any()
    if units is None:
        return {}
    axes = {
        name: mine
        for name in releasable
        if (mine := units.structure.sites.get(name, ()))
        and tuple(len(axis.units) for axis in mine) == tuple(masks[name].shape)
    }
    idle = ~units.find_needed(exact)
    unread = idle & ~units.find_needed(_restore(exact, _belonging(axes, idle, reads=False)))
    found = _either(
        _belonging(axes, unread, reads=False), _belonging(axes, idle & ~unread, reads=True)
    )
    # What is left has to explain it: with these elements anywhere, their units must be idle still.
    idle = ~units.find_needed(_restore(exact, found))
    still = _either(_belonging(axes, idle, reads=False), _belonging(axes, idle, reads=True))
    return {name: (mine & still[name]).to(masks[name].device) for name, mine in found.items()}


def _keep_slices(mask: Tensor) -> Iterator[Tensor]:
    """Return of each axis 0 if a slice along it is dropped whole, 1 if something of each stays."""
    # Bytes have kernels ten times as fast as those of truth values.
    kept = mask.view(torch.uint8)
    for dim in range(mask.dim() if mask.numel() else 0):
        yield kept.amax(dim).amin()


def _belonging(
    axes: Mapping[str, tuple[Axis, ...]], chosen: Tensor, reads: bool
) -> dict[str, Tensor]:
    """Tell by site which elements produce, or read, one of the units chosen by label."""
    found = {}
    for name, mine in axes.items():
        belongs = torch.zeros([len(axis.units) for axis in mine], dtype=torch.bool, device="cpu")
        for i, axis in enumerate(mine):
            if axis.reads == reads and len(chosen):
                units = axis.units.cpu()
                here = (units >= 0) & chosen[units.clamp(min=0)]
                belongs |= here.reshape(-1, *[1] * (len(mine) - i - 1))
        found[name] = belongs
    return found


def _either(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mine | second[name] for name, mine in first.items()}


def _restore(masks: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: m | live[n].to(m.device) if n in live else m for n, m in masks.items()}
