"""The prior of a site in all rows of its plates, of which one run of the model may see a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.priors.families import (
    Reading,
    UnreadablePriorError,
    check_readings,
    read_rows,
)

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]
"""Runs the model with given rows of sub-sampling plates, by name, and returns its nodes."""


Read = Callable[[Mapping[str, Any]], list[Tensor]]
"""Reads tensors of a site, with axes for its rows or for one in their place, from a run's nodes."""


def read_prior(name: str, nodes: Mapping[str, Any], run: Run) -> Reading:
    """Read the prior of a site of a trace, or raise an `UnreadablePriorError` that says why not."""
    found, useless = check_readings({name: read_unchecked(name, nodes, run)})
    if useless:
        raise UnreadablePriorError(useless[name])
    return found[name]


def read_unchecked(name: str, nodes: Mapping[str, Any], run: Run) -> Reading:
    """Read the prior of a site of a trace, without a look at its numbers: see `check_readings`."""
    here = read_rows(nodes[name])

    def read(seen: Mapping[str, Any]) -> list[Tensor]:
        return (here if seen is nodes else read_rows(seen[name])).tensors

    return here.with_tensors(read_in_all_rows(name, nodes, run, read))


def read_in_all_rows(name: str, nodes: Mapping[str, Any], run: Run, read: Read) -> list[Tensor]:
    """Read a site of a trace in all rows of its plates.

    Where it may differ between rows of sub-sampling plates, the model runs at all of them in turn.
    If it cannot be told which rows to take, that is an `UnreadablePriorError`.
    """  # noqa: DOC201, DOC501
    tensors = read(nodes)
    plates = _find_varying(nodes[name], tensors)
    if not plates:
        return tensors
    turns = list(_take_turns(plates))
    parts = [read(_see(rows, run, plates)) for rows in turns]
    return [
        _put_together(list(zip(turns, same, strict=True)), plates)
        for same in zip(*parts, strict=True)
    ]


def take_seen(tensor: Tensor, name: str, nodes: Mapping[str, Any]) -> Tensor:
    """Take the rows of a site, from a tensor in its shape, that its plates took in a run."""
    node = nodes[name]
    for frame in _partial_plates(node):
        axis = frame.dim - node["fn"].event_dim
        tensor = tensor.index_select(axis, nodes[frame.name]["value"].to(tensor.device))
    return tensor


def sees_part(node: Any) -> bool:
    """Tell whether a run of the model sees only some rows of the plates of a site."""
    return any(True for _ in _partial_plates(node))


# By axis of what is read, counted from the right, the frame of a plate that is seen in part.
_Plates = Mapping[int, Any]


def _find_varying(node: Any, tensors: Sequence[Tensor]) -> dict[int, Any]:
    """Find the plates, seen in part, along which a prior was not expanded from a single row."""
    found = {}
    for frame in _partial_plates(node):
        axis = frame.dim - node["fn"].event_dim
        if any(_has_rows(t, axis, frame) for t in tensors):
            found[axis] = frame
    return found


def _partial_plates(node: Any) -> Iterator[Any]:
    for frame in (frame for frame in node["cond_indep_stack"] if frame.vectorized):
        if frame.full_size not in (None, frame.size):
            yield frame


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


def _see(rows: Mapping[str, Tensor], run: Run, plates: _Plates) -> Mapping[str, Any]:
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
    return nodes


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
