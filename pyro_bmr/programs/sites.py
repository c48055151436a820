"""Sample sites of a model, as its guide sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_bmr.programs.centers import Center
from pyro_bmr.programs.distributions import find_element_support
from pyro_bmr.programs.scales import read_scale


@dataclass(frozen=True)
class Site:
    """A sample site of the model, as its guide sees it.

    Parameters
    ----------
    name : str
        Its name.
    shape : torch.Size
        Shape of its unconstrained value, at the full size of every plate.
    event_dim : int
        How many dimensions of that shape belong to one event.
    support : Constraint
        Support of the value; `torch.distributions.biject_to` leads there.
    plates : tuple
        Pyro's frames of the plates that it lies in.
    center : Center, optional
        The point that its unconstrained coordinates are measured from; None for zero.
    rest : str
        Where its prior is correlated, what the elements have that are not pruned: the prior given
        that the others are zero (``"conditional"``) or their marginal prior (``"marginal"``).

    Examples
    --------
    >>> Site("s", torch.Size([]), support=constraints.positive).constrain(torch.tensor(0.0))
    tensor(1.)
    """

    name: str
    shape: torch.Size
    event_dim: int = 0
    support: constraints.Constraint = constraints.real
    plates: tuple[Any, ...] = ()
    center: Center | None = field(default=None, compare=False)
    rest: str = "conditional"

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Map an unconstrained value to the support.

        Parameters
        ----------
        unconstrained : Tensor
            A value on the real line, from the center on.

        Returns
        -------
        Tensor
            The value of the sample site.
        """
        if self.center is not None:
            unconstrained = unconstrained + self.center.offset.to(unconstrained)
        return biject_to(find_element_support(self.support))(unconstrained)

    def zero_at_center(self) -> Tensor:
        """Tell which elements are zero where pruned, whatever the values of other sites are.

        Returns
        -------
        Tensor
            Boolean; broadcasts to the site's shape.
        """
        device = "cpu" if self.center is None else self.center.offset.device
        zero = self.constrain(torch.zeros((), device=device)) == 0
        return zero if self.center is None else zero & ~self.center.at_mean

    def axes(self) -> tuple[str | None, ...]:
        """Return the plate that each axis runs over, None for one without."""
        names = {frame.dim - self.event_dim: frame.name for frame in self.plates}
        return tuple(names.get(i - len(self.shape)) for i in range(len(self.shape)))

    def take(self, kept: Indices) -> Site:
        """Return the site with some indices of its axes only.

        Parameters
        ----------
        kept : tuple of Tensor
            By axis, the indices that stay, or None for all.

        Returns
        -------
        Site
            In plates of the size that is left.

        Raises
        ------
        ValueError
            If an axis is cut whose elements depend on one another.

        Examples
        --------
        >>> Site("w", torch.Size([3, 2]), 2).take((torch.tensor([0, 2]), None)).shape
        torch.Size([2, 2])
        """
        shape = torch.Size(
            size if index is None else len(index)
            for size, index in zip(self.shape, kept, strict=True)
        )
        joint_dim = biject_to(find_element_support(self.support)).domain.event_dim
        if any(index is not None for index in kept[len(kept) - joint_dim :]):
            msg = (
                f"cannot cut the site {self.name!r} along its last {joint_dim} axes: its support "
                f"{self.support} ties their elements together. Expected independent elements"
            )
            raise ValueError(msg)

        def cut(frame: Any) -> Any:
            axis = None if frame.dim is None else frame.dim - self.event_dim
            if axis is None or -axis > len(kept) or kept[axis] is None:
                return frame
            return frame._replace(size=shape[axis], full_size=shape[axis])

        plates = tuple(cut(frame) for frame in self.plates)
        return replace(self, shape=shape, plates=plates, center=self._cut_center(kept))

    def _cut_center(self, kept: Indices) -> Center | None:
        if self.center is None:
            return None
        cut = self.center.map(lambda t: take(t, kept))
        rows = take(
            torch.arange(self.shape.numel(), device="cpu").reshape(self.shape), kept
        ).reshape(-1)
        weights = {name: weight[rows] for name, weight in self.center.weights.items()}
        return replace(cut, weights=weights)


def is_scaled(node: Any) -> bool:
    """Tell whether a log density is scaled by more than sub-sampling plates."""
    plates = 1.0
    for frame in node["cond_indep_stack"]:
        plates *= (frame.full_size or frame.size) / frame.size
    if isinstance(node["scale"], float | int):
        return not math.isclose(node["scale"], plates, rel_tol=1e-5)
    scale = read_scale(node).double()
    return not torch.allclose(scale, scale.new_tensor(plates))


def find_full_shape(node: Any) -> torch.Size:
    """Return the shape of the value of a sample statement at the full size of its plates."""
    shape = list(node["fn"].shape())
    for frame in (frame for frame in node["cond_indep_stack"] if frame.vectorized):
        shape[frame.dim - node["fn"].event_dim] = frame.full_size or frame.size
    return torch.Size(shape)


Indices = tuple[Tensor | None, ...]
"""By axis of a tensor, the indices that stay, in ascending order; None if all do."""


def take(tensor: Tensor, kept: Indices) -> Tensor:
    """Take some indices of the last axes of a tensor."""
    for axis, index in enumerate(reversed(kept), 1):
        if index is not None:
            tensor = tensor.index_select(-axis, index.to(tensor.device))
    return tensor
