"""Sample sites of a model, as its guide sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_bmr.programs.distributions import find_element_support


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

    Examples
    --------
    >>> Site("w", torch.Size([3])).support
    Real()
    """

    name: str
    shape: torch.Size
    event_dim: int = 0
    support: constraints.Constraint = constraints.real
    plates: tuple[Any, ...] = ()

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """Map an unconstrained value to the support.

        Parameters
        ----------
        unconstrained : Tensor
            A value on the real line.

        Returns
        -------
        Tensor
            The value of the sample site.
        """
        return biject_to(find_element_support(self.support))(unconstrained)
