"""The prior of a site in all rows of its plates, of which one run of the model may see a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.priors.families import Reading, UnreadablePriorError, read_rows

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]
"""Runs the model with given rows of sub-sampling plates, by name, and returns its nodes."""


def read_prior(name: str, nodes: Mapping[str, Any], run: Run) -> Reading:
    """Read the prior of a site of a trace, or raise an `UnreadablePriorError` that says why not.

    Where it may differ between rows of sub-sampling plates, the model runs at all of them in turn.
    """
    reading = read_rows(nodes[name])
    plates = _find_varying(nodes[name], reading)
    if plates:
        parts = [(rows, read_rows(_see(name, rows, run, plates))) for rows in _take_turns(plates)]
        reading = _join(parts, plates)
    if reading.masked.numel() and reading.masked.all():
        msg = "it is masked out"
        raise UnreadablePriorError(msg)
    return reading


# By axis of what is read, counted from the right, the frame of a plate that is seen in part.
_Plates = Mapping[int, Any]


def _find_varying(node: Any, reading: Reading) -> dict[int, Any]:
    """Find the plates, seen in part, along which a prior was not expanded from a single row."""
    tensors = _tensors(reading)
    found = {}
    for frame in (frame for frame in node["cond_indep_stack"] if frame.vectorized):
        axis = frame.dim - node["fn"].event_dim
        partial = frame.full_size not in (None, frame.size)
        if partial and any(_has_rows(t, axis, frame) for t in tensors):
            found[axis] = frame
    return found


def _has_rows(tensor: Tensor, axis: int, frame: Any) -> bool:
    return tensor.dim() >= -axis and tensor.shape[axis] == frame.size


def _take_turns(plates: _Plates) -> Iterator[dict[str, Tensor]]:
    """Yield rows of plates, as many as they take at a time, until all have met all."""
    turns = [
        [
            (frame.name, torch.arange(start, start + frame.size, device="cpu") % frame.full_size)
            for start in range(0, frame.full_size, frame.size)
        ]
        for frame in plates.values()
    ]
    yield from map(dict, product(*turns))


def _see(name: str, rows: Mapping[str, Tensor], run: Run, plates: _Plates) -> Any:
    nodes = run(rows)
    for frame in plates.values():
        seen = nodes[frame.name]["value"] if frame.name in nodes else ()
        if not torch.equal(torch.as_tensor(seen, device="cpu"), rows[frame.name]):
            msg = (
                f"its prior may differ along the plate {frame.name!r}, of which only {frame.size} "
                f"of {frame.full_size} rows were seen, for the model is told which; pass arguments "
                "that show all rows"
            )
            raise UnreadablePriorError(msg)
    return nodes[name]


def _join(parts: Sequence[tuple[Mapping[str, Tensor], Reading]], plates: _Plates) -> Reading:
    tensors = [_tensors(reading) for _, reading in parts]
    together = [
        _put_together(
            [(rows, own[i]) for (rows, _), own in zip(parts, tensors, strict=True)], plates
        )
        for i in range(len(tensors[0]))
    ]
    density, masked, *gaussian = together
    return Reading(density, masked, Diagonal(*gaussian) if gaussian else None)


def _put_together(parts: Sequence[tuple[Mapping[str, Tensor], Tensor]], plates: _Plates) -> Tensor:
    _, first = parts[0]
    places = {a: frame for a, frame in plates.items() if _has_rows(first, a, frame)}
    shape = list(first.shape)
    for axis, frame in places.items():
        shape[axis] = frame.full_size
    whole = first.new_empty(shape)
    for rows, part in parts:
        index = [torch.arange(size, device="cpu") for size in shape]
        for axis, frame in places.items():
            index[axis] = rows[frame.name]
        whole[torch.meshgrid(*index, indexing="ij")] = part
    return whole


def _tensors(reading: Reading) -> list[Tensor]:
    gaussian = [] if reading.gaussian is None else [reading.gaussian.loc, reading.gaussian.scale]
    return [reading.log_density, reading.masked, *gaussian]
