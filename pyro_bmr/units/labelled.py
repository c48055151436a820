"""Labels of tensors as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FIXED = 0
"""The label of what is never cut: positions in images, the inside of a head."""

DATA = 1000.0
"""The depth of the arguments of the model."""

CONSTANT = 0.5
"""The depth of constants, which may be data too; what the program makes of them has more."""


MERGED = "a view merges its axis with another"
"""Why an axis is protected that lies in a merged one beside that which has the units."""


class Origin(IntEnum):
    """Where a label comes from; where two meet, the greater stands for both.

    Examples
    --------
    >>> max(Origin.INPUT, Origin.SITE).name
    'SITE'
    """

    FIXED = 0
    INPUT = 1
    CREATED = 2
    TENSOR = 3
    SITE = 4


@dataclass(frozen=True)
class Labelled:
    """The labels of a tensor.

    Parameters
    ----------
    axes : tuple of array
        For each axis, one label an index.
    sources : tuple of frozenset
        For each axis, the axes of sites and of other tensors whose indices its own are.
    depth : float
        How many contractions have gone in, and `DATA` more if arguments of the model have.

    Examples
    --------
    >>> Labelled((np.array([3, 4]),), (frozenset(),)).shape
    (2,)
    """

    axes: tuple[Ints, ...]
    sources: tuple[frozenset[int], ...]
    depth: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(len(axis) for axis in self.axes)

    def pick(self, axes: Iterable[int]) -> Labelled:
        """Take some of the axes, in this order.

        Parameters
        ----------
        axes : iterable of int
            Their positions.

        Returns
        -------
        Labelled
            With these.
        """
        order = list(axes)
        return replace(
            self,
            axes=tuple(self.axes[i] for i in order),
            sources=tuple(self.sources[i] for i in order),
        )

    def put(self, position: int, axis: Ints, sources: frozenset[int] | None = None) -> Labelled:
        """Replace an axis.

        Parameters
        ----------
        position : int
            Which.
        axis : array
            The labels that it gets.
        sources : frozenset, optional
            What it gets; without it, those that it has.

        Returns
        -------
        Labelled
            With this axis.
        """
        position %= len(self.axes)
        axes, all_sources = list(self.axes), list(self.sources)
        axes[position] = axis
        if sources is not None:
            all_sources[position] = sources
        return replace(self, axes=tuple(axes), sources=tuple(all_sources))


@dataclass(frozen=True)
class Product:
    """An axis that merges several with units of their own, of which one can keep them.

    Parameters
    ----------
    axes : list of array
        The labels of all axes that it merges.
    units : list of int
        Which of them have units.
    merged : array
        The labels of the merged axis, one for each combination.

    Examples
    --------
    >>> Product([np.array([1, 2]), np.array([3])], [0, 1], np.array([4, 5])).units
    [0, 1]
    """

    axes: list[Ints]
    units: list[int]
    merged: Ints


@dataclass(frozen=True)
class Protection:
    """Labels that cannot be cut, and why.

    Parameters
    ----------
    labels : array
        Which.
    reason : str
        Empty where it is plain.
    operation : str
        Its name, where it is one that has no rule.

    Examples
    --------
    >>> Protection(np.array([3]), "a mean over the axis").operation
    ''
    """

    labels: Ints
    reason: str = ""
    operation: str = ""


def spread(axes: list[Ints], carrier: int) -> Ints:
    """Lay the labels of one axis over all elements of several.

    Parameters
    ----------
    axes : list of array
        The labels of all.
    carrier : int
        Which one.

    Returns
    -------
    array
        As many as the merged axis has indices.

    Examples
    --------
    >>> spread([np.array([1, 2]), np.array([3, 4, 5])], 0)
    array([1, 1, 1, 2, 2, 2])
    """
    along = axes[carrier].reshape([-1 if i == carrier else 1 for i in range(len(axes))])
    return np.broadcast_to(along, [len(axis) for axis in axes]).reshape(-1)
