"""Which units of a small network are drawn, and in which order their lines cross little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]


def find_living(kept: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """By layer of units, those that a way leads from to an output; each mask is (outputs, inputs).

    A unit without inputs that live still has its bias; one that no output reads has no say.
    """
    living: list[Any] = [np.ones(len(kept[-1]), dtype=bool)]
    for mask in reversed(kept):
        living.insert(0, (mask & living[0][:, None]).any(0))
    return living


def choose_largest(
    weights: Sequence[Weights], living: Sequence[NDArray[np.bool_]], most: int
) -> list[NDArray[np.intp]]:
    """By layer, the living units; of more than ``most``, those with the largest weights out."""
    chosen = []
    for place, alive in enumerate(living):
        units = np.flatnonzero(alive)
        if len(units) > most:
            reads = weights[place].T if place < len(weights) else weights[-1]
            size = np.abs(reads).sum(1)[units]
            units = np.sort(units[np.argsort(-size, kind="stable")[:most]])
        chosen.append(units)
    return chosen


def order_units(kept: Sequence[NDArray[np.bool_]], sweeps: int = 8) -> list[NDArray[np.intp]]:
    """Order the units of each layer by the mean place of their neighbours, there and back.

    The barycentre heuristic of Sugiyama, Tagawa & Toda (1981); the best of all sweeps is returned.
    """
    sizes = [kept[0].shape[1], *(len(mask) for mask in kept)]
    order = [np.arange(size) for size in sizes]
    best, fewest = list(order), count_crossings(kept, order)
    for sweep in range(sweeps):
        forward = sweep % 2 == 0
        places = range(1, len(sizes)) if forward else range(len(sizes) - 2, -1, -1)
        for place in places:
            neighbour = place - 1 if forward else place + 1
            lines = kept[place - 1] if forward else kept[place].T
            height = _heights(order[neighbour])
            count = lines.sum(1)
            own = _heights(order[place])
            mean = np.where(count > 0, lines @ height / np.maximum(count, 1), own)
            order[place] = np.argsort(mean, kind="stable")
        crossings = count_crossings(kept, order)
        if crossings < fewest:
            best, fewest = list(order), crossings
    return best


def count_crossings(kept: Sequence[NDArray[np.bool_]], order: Sequence[NDArray[np.intp]]) -> int:
    """Count how many pairs of lines between neighbouring layers cross."""
    crossings = 0
    for place, mask in enumerate(kept):
        lines = mask[order[place + 1]][:, order[place]].astype(np.int64)
        # Of two lines that cross, one starts further on and ends earlier than the other.
        starts_later = lines[:, ::-1].cumsum(1)[:, ::-1] - lines
        ends_later = lines[::-1].cumsum(0)[::-1] - lines
        crossings += int((starts_later * ends_later).sum())
    return crossings


def _heights(order: NDArray[np.intp]) -> NDArray[np.float64]:
    """From 0 to 1 by unit."""
    height = np.empty(len(order))
    height[order] = (np.arange(len(order)) + 0.5) / max(1, len(order))
    return height
