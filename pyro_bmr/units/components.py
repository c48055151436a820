"""Units as connected components of labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_bmr.units.labelled import FIXED, MERGED, AxisOrigin, Ints, Product, spread
from pyro_bmr.units.labels import Labels


def find_components(labels: Labels) -> Components:
    """Find what labels are connected, and which of them cannot be cut."""
    pairs, waiting, beside = list(labels.pairs), list(labels.products), []
    of, count, along = _connect(pairs, labels.count)
    while waiting:
        product, carrier = _choose_carrier(waiting, of)
        waiting = [other for other in waiting if other is not product]
        pairs.append((product.merged, spread(product.axes, carrier)))
        beside += [product.axes[i] for i in product.units if i != carrier]
        of, count, along = _connect(pairs, labels.count)
    found = Components(of, np.zeros(count, bool), np.bincount(of, minlength=count))
    for axis in labels.outputs:
        found.protect(axis)
    for axis in beside:
        found.protect(axis, MERGED)
    found.protect(along, "it lies along an axis that cannot be cut")
    for protection in labels.protections:
        found.protect(protection.labels, protection.reason)
    touched = np.zeros(count, bool)
    touched[of[labels.find(AxisOrigin.SITE)]] = True
    for axis, merged in labels.merges:
        found.protect(axis[touched[of[axis]]], MERGED)
        if labels.origin(merged) == AxisOrigin.CREATED:
            found.protect(merged[touched[of[merged]]], MERGED)
    found.protected[of[FIXED]] = True
    return found


@dataclass
class Components:
    """The units of a graph: by label its component, and by component if it stays and its size."""

    of: Ints
    protected: NDArray[np.bool_]
    sizes: Ints

    def __post_init__(self) -> None:
        self._reasons: list[str] = [""]
        self._reason = np.zeros(len(self.protected), np.int64)

    def protect(self, axis: Ints, reason: str = "") -> None:
        """Have the units of some labels stay; the first reason is kept, empty where plain."""
        units = self.of[axis[axis != FIXED]]
        if reason not in self._reasons:
            self._reasons.append(reason)
        self._reason[units[~self.protected[units]]] = self._reasons.index(reason)
        self.protected[units] = True

    def find_reason(self, axis: Ints) -> str:
        """Say why units of an axis cannot be cut; empty where they can, or the reason is plain."""
        reasons = self._reason[self.of[axis[axis != FIXED]]]
        return self._reasons[reasons[np.argmax(reasons > 0)]] if len(reasons) else ""


def _connect(pairs: list[tuple[Ints, Ints]], count: int) -> tuple[Ints, int, Ints]:
    """Return by label its component, how many there are, and what meets `FIXED`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = (
        np.concatenate([np.zeros(0, np.int64), *(pair[i] for pair in pairs)]) for i in (0, 1)
    )
    held = (first == FIXED) | (second == FIXED)
    edges = first[~held], second[~held]
    graph = coo_array((np.ones(len(edges[0]), bool), edges), (count, count))
    found, of = connected_components(graph, directed=False)
    return of.astype(np.int64), found, np.concatenate([first[held], second[held]])


def _choose_carrier(waiting: list[Product], of: Ints) -> tuple[Product, int]:
    """Find a merged axis of which it is known where its units lie, or take the outermost."""
    for product in waiting:
        grid = of[product.merged].reshape([len(axis) for axis in product.axes])
        varies = [i for i in range(grid.ndim) if (grid != grid.take([0], i)).any()]
        if len(varies) == 1 and varies[0] in product.units:
            return product, varies[0]
    return waiting[0], waiting[0].units[0]
