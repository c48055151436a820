"""The average over one factor of a posterior: moments, quantiles, linear combinations, draws."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.averaging.averaged_guide import Mixture, SpikeAndSlab
from pyro_bmr.averaging.contrasts import WeightedNormals
from pyro_bmr.averaging.subset_mixtures import SubsetMixture, copy_tensors
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.programs.sites import Site

BySite = Mapping[str, Tensor]


@dataclass(frozen=True)
class FactorAverage(ABC):
    """What is averaged of a factor, by site; ``part`` draws it in a guide.

    The errors, of Monte Carlo, are empty where there are none.
    """

    sites: tuple[Site, ...]
    part: Any
    presence: BySite
    mean: BySite
    variance: BySite
    presence_error: BySite = field(default_factory=dict)
    mean_error: BySite = field(default_factory=dict)
    variance_error: BySite = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many elements its sites have."""
        return sum(site.shape.numel() for site in self.sites)

    @property
    def is_gaussian(self) -> bool:
        """Whether it is a mixture of Gaussians and zero, of which more than moments is known."""
        return True

    @abstractmethod
    def covariance(self) -> Tensor:
        """Return the covariance of its elements, one site after the other."""

    @abstractmethod
    def quantiles(self, levels: tuple[float, ...]) -> dict[str, Tensor]:
        """By site, quantiles of each element; the levels come first."""

    @abstractmethod
    def combine(self, contrast: BySite) -> list[WeightedNormals]:
        """Return the independent parts of a linear combination, coefficients by site."""

    @abstractmethod
    def draw(self, num_samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw its sites in unconstrained coordinates."""


def join_covariances(factors: Iterable[FactorAverage], names: Sequence[str]) -> Tensor:
    """Return the covariance of sites that these factors hold, in the order of their names."""
    variances = {name: one for factor in factors for name, one in factor.variance.items()}
    ends = itertools.accumulate(variances[name].numel() for name in names)
    places = {
        name: torch.arange(end - variances[name].numel(), end, device=variances[name].device)
        for name, end in zip(names, ends, strict=True)
    }
    size = sum(map(len, places.values()))
    device = next((one.device for one in variances.values()), None)
    full = torch.zeros(size, size, dtype=torch.float64, device=device)
    for factor in factors:
        nowhere = {s.name: torch.full((s.shape.numel(),), -1, device=device) for s in factor.sites}
        to = torch.cat([places.get(name, none) for name, none in nowhere.items()])
        index = (to >= 0).nonzero()[:, 0]
        full[to[index][:, None], to[index]] = factor.covariance()[index[:, None], index]
    return full


def average_independent(factor: Factor, part: Any, presence: BySite) -> FactorAverage:
    """Average over independent elements: ``presence`` of the site, if it may be reduced."""
    (site,) = factor.sites
    marginal = factor.marginals()[site.name]
    slab = Diagonal(marginal.loc.clone(), marginal.scale.clone())
    mean, variance, p = slab.loc, slab.scale.square(), None
    if presence:
        p = presence[site.name]
        mean, variance = p * mean, p * variance + p * (1 - p) * mean.square()
        part = SpikeAndSlab(site, slab, p)
    moments = ({site.name: mean}, {site.name: variance})
    own = copy_tensors(factor)
    return IndependentAverage((site,), part, presence, *moments, factor=own, slab=slab)


@dataclass(frozen=True)
class IndependentAverage(FactorAverage):
    """Independent elements at one site: a spike at zero, and the ``slab``."""

    factor: Factor = field(kw_only=True)
    slab: Diagonal = field(kw_only=True)

    @property
    def is_gaussian(self) -> bool:
        """See `FactorAverage.is_gaussian`."""
        return not self.factor.obstacle

    @override
    def covariance(self) -> Tensor:
        return self.variance[self._name].double().reshape(-1).diag()

    @override
    def quantiles(self, levels: tuple[float, ...]) -> dict[str, Tensor]:
        loc, scale, p = self._columns()
        below = p * torch.special.ndtr(-loc / scale)
        rows = []
        for level in levels:
            # The level among what is present, left and right of the spike.
            left = (level / p).clamp(max=1.0)
            right = ((level - (1 - p)) / p).clamp(min=0.0)
            among = torch.where(level < below, left, right)
            value = loc + scale * torch.special.ndtri(among)
            at_spike = (level >= below) & (level <= below + (1 - p))
            rows.append(torch.where(at_spike, 0.0, value))
        stacked = torch.stack(rows).reshape(len(levels), *self.sites[0].shape)
        return {self._name: stacked.to(self.slab.loc.dtype)}

    @override
    def combine(self, contrast: BySite) -> list[WeightedNormals]:
        coefficient = contrast[self._name].reshape(-1)
        loc, scale, p = (column * (coefficient != 0) for column in self._columns())
        weights = torch.stack([p, 1 - p], 1)
        zero = torch.zeros_like(loc)
        locs = torch.stack([coefficient * loc, zero], 1)
        scales = torch.stack([coefficient.abs() * scale, zero], 1)
        some = coefficient.nonzero()[:, 0]
        # What is there for sure adds up to one normal.
        sure = some[p[some] == 1]
        unsure = some[p[some] < 1]
        parts = [WeightedNormals(weights[i], locs[i], scales[i]) for i in unsure]
        if len(sure):
            scale = scales[sure, 0].square().sum(0, keepdim=True).sqrt()
            parts.append(WeightedNormals(torch.ones_like(scale), locs[sure, :1].sum(0), scale))
        return parts

    @override
    def draw(self, num_samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        like = self.slab.loc

        def normals(count: int) -> Iterator[Tensor]:
            for _ in range(num_samples):
                yield torch.randn(
                    count, generator=generator, dtype=torch.float64, device=like.device
                )

        if not self.is_gaussian:
            rows = [one[self._name] for one in self.factor.draws([self._name], normals)]
            return {self._name: torch.stack(rows)}
        loc, scale, p = self._columns()
        value = loc + scale * torch.stack([*normals(len(loc))])
        uniform = torch.rand(
            value.shape, generator=generator, dtype=torch.float64, device=like.device
        )
        drawn = torch.where(uniform < p, value, 0.0)
        return {self._name: drawn.reshape(num_samples, *self.sites[0].shape).to(like.dtype)}

    @property
    def _name(self) -> str:
        return self.sites[0].name

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every element, mean and standard deviation where it is present, and how probably."""
        loc, scale = self.slab.loc.double().reshape(-1), self.slab.scale.double().reshape(-1)
        p = self.presence.get(self._name)
        p = torch.ones_like(loc) if p is None else p.double().reshape(-1)
        # What was pruned before is never present.
        return loc, torch.where(scale > 0, scale, 1.0), torch.where(scale > 0, p, 0.0)


def average_correlated(
    mixture: SubsetMixture,
    presence: BySite,
    presence_error: BySite,
    part: Any = None,
) -> FactorAverage:
    """Average over the subsets of a correlated factor."""
    factor = mixture.elements.factor
    moments = mixture.moments()

    def by_site(vector: Tensor | None) -> dict[str, Tensor]:
        if vector is None:
            return {}
        return factor.spread(vector.to(factor.posterior.loc.dtype), 0.0)

    return CorrelatedAverage(
        factor.sites,
        Mixture(mixture) if part is None else part,
        presence,
        by_site(moments.mean),
        by_site(moments.variance),
        presence_error,
        by_site(moments.mean_error),
        by_site(moments.variance_error),
        factor=factor,
        mixture=mixture,
    )


@dataclass(frozen=True)
class CorrelatedAverage(FactorAverage):
    """A mixture of correlated Gaussians."""

    factor: JointFactor = field(kw_only=True)
    mixture: SubsetMixture = field(kw_only=True)

    @override
    def covariance(self) -> Tensor:
        return self._covariance

    @cached_property
    def _covariance(self) -> Tensor:
        mask = self.factor.flat_mask
        own = self.mixture.covariance()
        full = own.new_zeros(len(mask), len(mask))
        full[mask[:, None] & mask] = own.reshape(-1)
        return full

    @override
    def quantiles(self, levels: tuple[float, ...]) -> dict[str, Tensor]:
        values = self.mixture.quantiles(levels)
        return self.factor.spread(values.to(self.factor.posterior.loc.dtype), 0.0)

    @override
    def combine(self, contrast: BySite) -> list[WeightedNormals]:
        zero = self.mixture.weight.new_zeros(())
        full = {site.name: contrast.get(site.name, zero) for site in self.sites}
        loc, scale = self.mixture.project(self.factor.flatten(full)[:, None])
        shares = self.mixture.shares
        if shares is None:
            return [WeightedNormals(self.mixture.weight, loc[:, 0], scale[:, 0])]
        model, batch = shares.nonzero().unbind(1)
        return [WeightedNormals(shares[model, batch], loc[model, 0], scale[model, 0], batch)]

    @override
    def draw(self, num_samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        latent = self.mixture.draw(num_samples, generator)
        return self.factor.spread(latent.to(self.factor.posterior.loc.dtype), 0.0)
