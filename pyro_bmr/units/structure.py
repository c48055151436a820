"""Units: what a network computes at one index, and all that produces or reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the unit that each of its indices belongs to.

    Parameters
    ----------
    units : Tensor
        Labels, int64, one an index; -1 where the index cannot go. A label stands for the same unit
        wherever it occurs.
    reads : bool
        True if the network sums over this axis, so that an index is what reads the unit (a
        column of a weight); False if an index produces it (a row, a bias).

    Examples
    --------
    >>> import torch
    >>> Axis(torch.tensor([0, 1, -1]), reads=False).reads
    False
    """

    units: Tensor
    reads: bool


@dataclass(frozen=True)
class Layer:
    """Units beside each other, of which any number may go.

    Parameters
    ----------
    name : str
        The first sample site that produces them; of inputs, the site that reads them.
    kind : str
        ``"unit"``, ``"channel"`` (of a convolution), ``"head"`` (of attention) or ``"input"``.
    units : Tensor
        Their labels, int64, in the order of the axis.

    Examples
    --------
    >>> import torch
    >>> Layer("fc1.weight", "unit", torch.arange(3)).kind
    'unit'
    """

    name: str
    kind: str
    units: Tensor


@dataclass(frozen=True)
class Structure:
    """The units of a model.

    Parameters
    ----------
    sites : mapping
        By latent sample site, the axes of its value.
    tensors : mapping
        The same for what the model uses beside its sites: parameters, buffers, constants. By their
        name in the capture.
    layers : tuple of Layer
        Disjoint; every label that is not -1 is in one.
    protected : mapping
        By site or tensor, why some of its axes cannot be cut, for those where that is not plain:
        an operation that is not known, a mean or a softmax over the axis.
    released : Tensor, optional
        Boolean, by label: True for units that nothing needs once what reads them is zero; None if
        that is not known.
    nodes : mapping
        By name of a node of the captured graph, the labels of the units of each axis.

    Examples
    --------
    >>> Structure({}, {}, (), {}).layers
    ()
    """

    sites: Mapping[str, tuple[Axis, ...]]
    tensors: Mapping[str, tuple[Axis, ...]]
    layers: tuple[Layer, ...]
    protected: Mapping[str, str]
    released: Tensor | None = None
    nodes: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def find_readers(self, name: str) -> set[str]:
        """Return the sites that read what a site produces and nothing else needs.

        Parameters
        ----------
        name : str
            A latent site.

        Returns
        -------
        set of str
            The site itself may be among them.
        """
        if self.released is None:
            return set()
        labels = [axis.units for axis in self.sites.get(name, ()) if not axis.reads]
        produced = [one[one >= 0] for one in labels]
        released = [one[self.released[one]] for one in produced]
        return {
            other
            for other, axes in self.sites.items()
            for axis in axes
            if axis.reads and any(torch.isin(one, axis.units).any() for one in released)
        }
