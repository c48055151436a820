"""Units as connected components of labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pyro_bmr.structure.labels import FIXED, Ints, Labels, Origin


def find_components(labels: Labels) -> Components:
    """Find what labels are connected, and which of them cannot be cut.

    Parameters
    ----------
    labels : Labels
        All that is known of them.

    Returns
    -------
    Components
        The units.

    Examples
    --------
    >>> labels = Labels()
    >>> a, b = labels.fresh(2, Origin.SITE), labels.fresh(2, Origin.SITE)
    >>> _ = labels.join(a, b)
    >>> labels.protect(a[:1], "a mean")
    >>> found = find_components(labels)
    >>> found.of[b] == found.of[a], found.protected[found.of[b]]
    (array([ True,  True]), array([ True, False]))
    """
    first, second = _join_pairs(labels.pairs)
    held = (first == FIXED) | (second == FIXED)
    edges = first[~held], second[~held]
    graph = coo_array((np.ones(len(edges[0]), bool), edges), (labels.count, labels.count))
    count, of = connected_components(graph, directed=False)
    of = of.astype(np.int64)
    found = Components(of, np.zeros(count, bool), np.bincount(of, minlength=count))
    along = np.concatenate([first[held], second[held]])
    found.protect(along, "it lies along an axis that cannot be cut")
    for protection in labels.protections:
        found.protect(protection.labels, protection.reason)
    touched = np.zeros(count, bool)
    touched[of[labels.find(Origin.SITE)]] = True
    for axis, merged in labels.merges:
        reason = "a view merges its axis with another"
        found.protect(axis[touched[of[axis]]], reason)
        if labels.origin(axis) == Origin.CREATED:
            found.protect(merged[touched[of[merged]]], reason)
    found.protected[of[FIXED]] = True
    return found


@dataclass
class Components:
    """The units of a graph.

    Parameters
    ----------
    of : array
        By label, the component that it is in.
    protected : array
        By component, whether it cannot be cut.
    sizes : array
        By component, how many labels it has.

    Examples
    --------
    >>> found = Components(np.array([0, 1]), np.zeros(2, bool), np.ones(2, np.int64))
    >>> found.protect(np.array([1]), "a mean")
    >>> found.protected, found.find_reason(np.array([0, 1]))
    (array([False,  True]), 'a mean')
    """

    of: Ints
    protected: NDArray[np.bool_]
    sizes: Ints

    def __post_init__(self) -> None:
        self._reasons: list[str] = [""]
        self._reason = np.zeros(len(self.protected), np.int64)

    def protect(self, axis: Ints, reason: str) -> None:
        """Have the units of some labels stay.

        Parameters
        ----------
        axis : array
            The labels.
        reason : str
            Why; the first that is not empty is kept.
        """
        units = self.of[axis[axis != FIXED]]
        self.protected[units] = True
        if reason:
            if reason not in self._reasons:
                self._reasons.append(reason)
            silent = units[self._reason[units] == 0]
            self._reason[silent] = self._reasons.index(reason)

    def find_reason(self, axis: Ints) -> str:
        """Say why units of an axis cannot be cut.

        Parameters
        ----------
        axis : array
            Its labels.

        Returns
        -------
        str
            The first reason; empty where there is none, or it is plain.
        """
        reasons = self._reason[self.of[axis[axis != FIXED]]]
        return self._reasons[reasons[np.argmax(reasons > 0)]] if len(reasons) else ""


def _join_pairs(pairs: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    first, second = zip(*pairs, strict=True)
    return np.concatenate(first), np.concatenate(second)
