"""Where the coordinates of a site begin: at zero, or where its spike is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Independent, MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Laplace,
    MixtureSameFamily,
    Normal,
    StudentT,
    TransformedDistribution,
)


@dataclass(frozen=True, eq=False)
class Center:
    r"""The point that unconstrained coordinates are measured from, where pruned elements are.

    .. math:: c = c_0 + \sum_j W_j v_j

    with ``offset`` :math:`c_0` of the site's shape and ``weights``, by site before this one in its
    factor, of that site's flattened unconstrained value :math:`v_j`. ``at_mean``, of the same
    shape, is True for elements whose center is the mean of their prior. Pruned elements of a
    positive site that are zero have the offset :math:`-\infty`.
    """

    offset: Tensor
    at_mean: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Center:
        """Change what has the shape of the site, and forget the weights."""
        return Center(change(self.offset), change(self.at_mean))

    def to(self, device: torch.device) -> Center:
        """Move to a device."""
        weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return Center(self.offset.to(device), self.at_mean.to(device), weights)

    def locate(self, prior: Any) -> Tensor:
        """Return the center, in unconstrained coordinates, in a run where the prior is known."""
        if not self.at_mean.any():
            return self.offset
        offset, at_mean = (t.to(find_mean(prior).device) for t in (self.offset, self.at_mean))
        return torch.where(at_mean, find_mean(prior), offset)


class CenterMessenger(Messenger):
    """Effect handler that shows the priors of latent sites in the coordinates of their centers."""

    def __init__(self, centers: Mapping[str, Center]) -> None:
        super().__init__()
        self.centers = centers

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.centers:
            by = take_center(self.centers[msg["name"]], msg).locate(msg["fn"])
            # What is pruned at minus infinity has no coordinate to shift.
            by = by.masked_fill(by.isneginf(), 0)
            if by.any():
                msg["fn"] = shift(msg["fn"], by)


def take_center(center: Center, msg: Any) -> Center:
    """Take the rows of a center that the plates of a sample statement take."""
    return center.map(lambda t: pyro.subsample(t, event_dim=msg["fn"].event_dim))


def find_mean(prior: Any) -> Tensor:
    """Return the mean of each element, in unconstrained coordinates where it has others."""
    if isinstance(prior, Independent | MaskedDistribution):
        return find_mean(prior.base_dist)
    if isinstance(prior, TransformedDistribution):
        return find_mean(prior.base_dist).expand(prior.batch_shape + prior.event_shape)
    return prior.mean


def shift(prior: Any, by: Tensor) -> Any:
    """Return the distribution of a draw minus a number, in unconstrained coordinates.

    A NotImplementedError says that the family is not known.
    """
    if isinstance(prior, Independent):
        return Independent(shift(prior.base_dist, by), prior.reinterpreted_batch_ndims)
    if isinstance(prior, MaskedDistribution):
        return MaskedDistribution(shift(prior.base_dist, by), prior._mask)
    if isinstance(prior, MixtureSameFamily) and not prior.event_shape:
        parts = shift(prior.component_distribution, by[..., None])
        return dist.MixtureSameFamily(prior.mixture_distribution, parts, validate_args=False)
    if isinstance(prior, TransformedDistribution):
        base = shift(prior.base_dist, by)
        return dist.TransformedDistribution(base, prior.transforms, validate_args=False)
    if not isinstance(prior, Normal | Laplace | StudentT | Cauchy):
        raise NotImplementedError(type(prior).__name__)
    parameters = {name: getattr(prior, name) for name in prior.arg_constraints}
    return type(prior)(
        **{**parameters, "loc": prior.loc - by.to(prior.loc.device)}, validate_args=False
    )


def add_weighted(sites: Iterable[Any], coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add to flattened coordinates of sites what their centers take of others, which come first.

    Values may have batch dimensions to the left.
    """
    values: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for site in sites:
        own = coordinates[site.name]
        weights = {} if site.center is None else site.center.weights
        for name, weight in weights.items():
            own = own + values[name] @ weight.to(own).mT
        added[site.name] = values[site.name] = own
        if site.center is not None:
            values[site.name] = own + site.center.offset.reshape(-1).to(own)
    return added
