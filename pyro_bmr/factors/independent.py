"""A factor of independent Gaussians at one site."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to
from typing_extensions import override

from pyro_bmr.factors.factor import (
    Factor,
    Normals,
    Prior,
    Search,
    Terms,
    check_finite,
    check_positive,
    everything,
)
from pyro_bmr.factors.vanishing import put_at_zero, vanishes
from pyro_bmr.mathematics.evidence import delta_f_released, delta_f_spike, total_dropped
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.sweep import sweep
from pyro_bmr.mathematics.transfers import find_extremes
from pyro_bmr.programs.sites import Indices, Site, take


@dataclass(frozen=True)
class IndependentFactor(Factor):
    """Independent Gaussians at one site, as in ``AutoNormal``.

    Parameters
    ----------
    site : Site
        The site.
    loc : Tensor
        Means, of the site's shape.
    scale : Tensor
        Standard deviations, of the site's shape; or, with a constraint, the parameter that the
        guide optimises in their place. A reduced guide starts from a copy of it, which is exact
        where a round trip through the constraint is not.
    scale_constraint : Constraint, optional
        Leads from the parameter to the standard deviations.
    mask : Tensor, optional
        Boolean, of the site's shape, True keeps; None if nothing was pruned.
    prior : Prior, optional
        Of the site, if it may be reduced.

    Examples
    --------
    >>> site = Site("w", torch.Size([2]))
    >>> factor = IndependentFactor(site, torch.tensor([0.0, 3.0]), torch.ones(2))
    >>> factor.with_priors({"w": Prior(torch.tensor(-1.0))}).scores()["w"]
    tensor([-0.0811,  4.4189])
    """

    site: Site
    loc: Tensor
    scale: Tensor
    scale_constraint: constraints.Constraint | None = None
    mask: Tensor | None = None
    prior: Prior | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site."""
        return (self.site,)

    @property
    def priors(self) -> Mapping[str, Prior]:
        """See ``Factor.priors``."""
        return {} if self.prior is None else {self.site.name: self.prior}

    @override
    def check(self) -> None:
        name = self.site.name
        check_finite(name, "location", self.loc)
        check_finite(name, "scale", self.scale)
        check_positive(name, self._scale_transform(self.scale))

    @override
    def locations(self) -> dict[str, Tensor]:
        if self.mask is None:
            return {self.site.name: self.loc}
        loc = torch.empty_like(self.loc, memory_format=torch.contiguous_format)
        sweep(_write_kept, self.loc, self.mask.view(torch.uint8), loc)
        return {self.site.name: loc}

    @override
    def marginals(self) -> dict[str, Diagonal]:
        scale = self._scale_transform(self.scale)
        if self.mask is not None:
            scale = torch.where(self.mask, scale, 0)
        return {self.site.name: Diagonal(self.locations()[self.site.name], scale)}

    @override
    def kept(self) -> dict[str, Tensor]:
        return {self.site.name: everything(self.loc) if self.mask is None else self.mask}

    @override
    def draws(self, names: Collection[str], normals: Normals) -> Iterator[dict[str, Tensor]]:
        marginal = self.marginals()[self.site.name]
        for noise in normals(self.loc.numel()):
            step = marginal.scale * noise.to(marginal.scale).reshape(self.loc.shape)
            yield {self.site.name: marginal.loc + step}

    @override
    def with_priors(self, priors: Mapping[str, Prior]) -> IndependentFactor:
        return replace(self, prior=priors.get(self.site.name))

    @override
    def scores(self) -> dict[str, Tensor]:
        if self.prior is None:
            return {}
        if self.prior.divergence is not None:
            scores = self.prior.divergence.delta_f
        else:
            held = Diagonal(self.loc, self.scale)
            scores = delta_f_spike(held, self.prior.log_density_at_zero, self._scale_transform)
        if self.mask is not None:
            scores = torch.where(self.mask, scores, 0)
        return {self.site.name: scores}

    @override
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: scores[name] for name in self.priors}

    @override
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        return {name: scores[name] > -margin for name in self.priors}

    @override
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        return independent_terms(self, scores, index)

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        name = self.site.name
        return {name: total_dropped(scores[name], masks[name])} if name in masks else {}

    @property
    def releasable(self) -> tuple[str, ...]:
        """See ``Factor.releasable``."""
        known = self.prior is not None and (self.prior.divergence or self.prior.gaussian)
        return (self.site.name,) if known else ()

    @override
    def released(self) -> dict[str, Tensor]:
        if self.prior is not None and self.prior.divergence is not None:
            released = -self.prior.divergence.value
            return {self.site.name: torch.where(self.kept()[self.site.name], released, 0)}
        if self.prior is None or self.prior.gaussian is None:
            return {}
        gaussian, log_prior = self.prior.gaussian, self.prior.log_density_at_zero
        device = self.loc.device
        gaussian = Diagonal(gaussian.loc.to(device), gaussian.scale.to(device))
        released = delta_f_released(self.stored, gaussian, log_prior.to(device))
        return {self.site.name: torch.where(self.kept()[self.site.name], released, 0)}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> IndependentFactor:
        mask = masks.get(self.site.name)
        if mask is None:
            return self
        left = mask if self.mask is None else mask & self.mask
        site = self.site
        if vanishes(self.prior):
            site = put_at_zero(site, self.kept()[site.name] & ~left)
        return replace(self, site=site, mask=left)

    @override
    def take(self, kept: Mapping[str, Indices]) -> IndependentFactor:
        mine = kept.get(self.site.name)
        if mine is None:
            return replace(self, prior=None)
        return replace(
            self,
            site=self.site.take(mine),
            loc=take(self.loc, mine),
            scale=take(self.scale, mine),
            mask=None if self.mask is None else take(self.mask, mine),
            prior=None,
        )

    @property
    def stored(self) -> Diagonal:
        """Means and standard deviations; those of pruned elements mean nothing."""
        return Diagonal(self.loc, self._scale_transform(self.scale))

    def scale_gradient(self, gradient: Tensor) -> Tensor:
        """Turn a gradient by what the guide optimises into one by the standard deviations.

        Parameters
        ----------
        gradient : Tensor
            Of the site's shape.

        Returns
        -------
        Tensor
            Of the same shape.
        """
        with torch.enable_grad():
            parameter = self.scale.detach().requires_grad_()
            total = self._scale_transform(parameter).sum()
            (slope,) = torch.autograd.grad(total, parameter)
        return gradient / slope

    def replaced(self, posterior: Diagonal, taken: Tensor) -> IndependentFactor:
        """Return the factor with another posterior of some elements, and no prior.

        Parameters
        ----------
        posterior : Diagonal
            Of the site's shape; read where ``taken``.
        taken : Tensor
            Boolean, of the site's shape.

        Returns
        -------
        IndependentFactor
            All other elements exactly as they were.
        """
        scale = torch.where(taken, posterior.scale, 1.0)
        parameter = self._scale_transform.inv(scale).to(self.scale)
        return replace(
            self,
            loc=torch.where(taken, posterior.loc.to(self.loc), self.loc),
            scale=torch.where(taken, parameter, self.scale),
            prior=None,
        )

    @property
    def _scale_transform(self) -> Any:
        return transform_to(self.scale_constraint or constraints.real)


def check_factors(factors: Sequence[Factor]) -> None:
    """Check factors, the independent ones by their extremes: see ``Factor.check``."""
    independent = [f for f in factors if isinstance(f, IndependentFactor) and f.loc.numel()]
    locs = find_extremes([factor.loc for factor in independent])
    scales = find_extremes([factor.scale for factor in independent])
    sound = set()
    for factor, loc, scale in zip(independent, locs, scales, strict=True):
        # The extremes of what the guide optimises are the extremes of the scale.
        ends = torch.tensor(scale, dtype=factor.scale.dtype, device="cpu")
        if all(map(math.isfinite, (*loc, *scale))) and (factor._scale_transform(ends) > 0).all():
            sound.add(factor.site.name)
    for other in factors:
        if sound.isdisjoint(site.name for site in other.sites):
            other.check()


def independent_terms(
    factor: Factor, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]
) -> Terms:
    """Return the terms of a factor of independent elements: of those left that can go."""
    kept = factor.kept()
    able = {name: kept[name] & scores[name].isfinite() for name in factor.priors}
    like = next(iter(kept.values()))
    element = [like.new_zeros(0, dtype=torch.long), *(index[n][t] for n, t in able.items())]
    cost = [like.new_zeros(0, dtype=torch.float64), *(scores[n][t] for n, t in able.items())]
    return Terms(torch.cat(element), torch.cat([part.double() for part in cost]))


def _write_kept(_: None, values: Tensor, kept: Tensor, out: Tensor) -> None:
    # As bytes, a mask is many times faster to multiply by than as booleans.
    out.copy_(values * kept)
