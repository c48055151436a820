"""A factor with one correlated Gaussian over several sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.factors.factor import (
    Factor,
    Normals,
    Prior,
    Search,
    Terms,
    check_finite,
    check_positive,
)
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint_prior import STANDARD, JointPrior, couple_priors
from pyro_bmr.mathematics.conditional_noise import condition_noise
from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.evidence import (
    Correlated,
    delta_f_of_set,
    delta_f_spike_chain,
    delta_f_spikes,
)
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, Diagonal, LowRank
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.mathematics.singular_contrast import SingularContrast
from pyro_bmr.programs.sites import Indices, Site, take


@dataclass(frozen=True)
class JointFactor(Factor):
    """One correlated Gaussian over several sites, as in ``AutoMultivariateNormal``.

    Parameters
    ----------
    joint_sites : tuple of Site
        The sites; their flattened values follow one another in the vector.
    posterior : Dense or LowRank
        Over the elements that have not been pruned before.
    mask : Tensor, optional
        Boolean, over all elements of all sites; True for those that ``posterior`` holds. None if
        nothing was pruned.
    site_priors : mapping
        By site, the prior of those that may be reduced.
    joint_prior : JointPrior, optional
        Of elements whose prior is correlated.
    independent : IndependentFactor, optional
        The same posterior, of independent elements, if only the prior is correlated.

    Examples
    --------
    >>> sites = (Site("a", torch.Size([1])), Site("b", torch.Size([1])))
    >>> q = Dense(torch.zeros(2), torch.eye(2) / 2)
    >>> JointFactor(sites, q).marginals()["b"].scale
    tensor([0.5000])
    """

    joint_sites: tuple[Site, ...]
    posterior: Dense | LowRank
    mask: Tensor | None = None
    site_priors: Mapping[str, Prior] = field(default_factory=dict)
    joint_prior: JointPrior | None = None
    independent: IndependentFactor | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of the vector."""
        return self.joint_sites

    @property
    def priors(self) -> Mapping[str, Prior]:
        """See ``Factor.priors``."""
        return self.site_priors

    @override
    def check(self) -> None:
        kept = self.kept()
        for name, marginal in self.marginals().items():
            check_finite(name, "location", marginal.loc)
            check_finite(name, "scale", marginal.scale)
            check_positive(name, marginal.scale[kept[name]])

    @override
    def locations(self) -> dict[str, Tensor]:
        return self._by_site(self._embed(self.posterior.loc, 0.0))

    @override
    def marginals(self) -> dict[str, Diagonal]:
        marginals = self.posterior.marginals()
        loc, scale = (self._by_site(self._embed(t, 0.0)) for t in (marginals.loc, marginals.scale))
        return {name: Diagonal(loc[name], scale[name]) for name in loc}

    @override
    def kept(self) -> dict[str, Tensor]:
        return self._by_site(self.flat_mask)

    @override
    def draws(self, names: Collection[str], normals: Normals) -> Iterator[dict[str, Tensor]]:
        mine = [torch.full(s.shape, s.name in names, device="cpu").reshape(-1) for s in self.sites]
        wanted = torch.cat(mine).to(self.posterior.loc.device)
        held, _ = self._exact.split(wanted[self.flat_mask])
        for noise in normals(held.noise_size):
            full = torch.zeros_like(wanted, dtype=self.posterior.loc.dtype)
            full[wanted & self.flat_mask] = held.transform(noise.to(held.loc)).to(full)
            by_site = self._by_site(full)
            yield {name: by_site[name] for name in names}

    @override
    def with_priors(self, priors: Mapping[str, Prior]) -> JointFactor:
        mine = {site.name: priors[site.name] for site in self.sites if site.name in priors}
        return replace(self, site_priors=mine, joint_prior=self.joint_prior or self._couple(mine))

    @override
    def scores(self) -> dict[str, Tensor]:
        alone = delta_f_spikes(self._coupled, self._log_prior)
        return self._reducible(self._embed(alone.to(self.posterior.loc.dtype), 0.0))

    @override
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        path = eliminate(self._coupled, self._log_prior, torch.inf)
        return self._reducible(self._embed(path, -torch.inf))

    @override
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        log_prior = self._log_prior
        candidate = log_prior.isfinite()
        keep = torch.ones_like(candidate)
        if math.isinf(margin):
            keep[candidate] = margin > 0
        elif candidate.any():
            posterior, _ = self._coupled.split(candidate)
            keep[candidate] = ~choose(posterior, log_prior[candidate] + margin)
        return self._reducible(self._embed(keep, False))

    @override
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        log_prior = self._log_prior
        able = log_prior.isfinite()
        no_index = torch.full((), -1, device=able.device)
        element = self.flatten({site.name: index.get(site.name, no_index) for site in self.sites})
        posterior, _ = self._coupled.split(able)
        return Terms(element[able], log_prior[able] + 0.5 * LOG_2PI, posterior)

    @override
    def delta_f(
        self,
        scores: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> dict[str, float]:
        drop = self._drop(masks)
        gone, _ = self._coupled.split(drop)
        parts = torch.zeros_like(self._log_prior)
        chain = delta_f_spike_chain(gone, self._log_prior[drop])
        if not chain.isfinite().all():  # where there is no posterior half the way
            chain = torch.zeros_like(chain)
            chain[0] = delta_f_of_set(self._coupled, self._log_prior, drop)
        parts[drop] = chain
        by_site = self._by_site(self._embed(parts, 0.0))
        return {name: float(part.sum()) for name, part in by_site.items() if name in masks}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> JointFactor:
        drop = self._drop(masks)
        rest = self._rest(drop).to(self.posterior.loc.dtype)
        independent = None if self._marginal else self.independent
        return replace(
            self,
            posterior=rest,
            mask=self._embed(~drop, False),
            independent=independent and independent.prune(masks),
        )

    @override
    def take(self, kept: Mapping[str, Indices]) -> JointFactor:
        whole = {site.name: (None,) * len(site.shape) for site in self.sites}
        mine = {site.name: kept.get(site.name, whole[site.name]) for site in self.sites}
        places = self._by_site(torch.arange(len(self.flat_mask), device=self.flat_mask.device))
        stay = torch.zeros_like(self.flat_mask)
        for name, indices in mine.items():
            stay[take(places[name], indices)] = True
        marginal, _ = self._exact.split(stay[self.flat_mask])
        left = self._by_site(stay)
        return JointFactor(
            tuple(_take_site(site, mine[site.name], left) for site in self.sites),
            marginal.to(self.posterior.loc.dtype),
            None if self.mask is None else self.mask[stay],
        )

    def condition_noise(self, masks: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the map from the noise of a draw to that of the same draw of what remains.

        Parameters
        ----------
        masks : mapping
            As of `prune`.

        Returns
        -------
        callable
            Of a vector in float64; see `pyro_bmr.mathematics.conditional_noise`.
        """
        return condition_noise(self._exact, self._drop(masks))

    def left(self) -> tuple[Correlated, Tensor]:
        """Return what has not been pruned, for those who search among its subsets.

        Returns
        -------
        posterior : Dense, LowRank, Contrast or SingularContrast
            Of the elements that are left, in float64, with their joint prior if they have one.
        log_prior : Tensor
            ln p(θ_i = 0) of each in nats; ``inf`` for those that cannot go.
        """
        return self._coupled, self._log_prior

    def conditioned(self) -> Correlated:
        """Return what the posterior of each reduced model follows from, by ``split``.

        Returns
        -------
        Dense, LowRank, Contrast or SingularContrast
            Of the elements that are left, in float64.
        """
        moves = self._marginal or isinstance(self._coupled, SingularContrast)
        return self._coupled if moves else self._exact

    def spread(self, vector: Tensor, fill: float | bool) -> dict[str, Tensor]:
        """Bring a value for each element that is left into the shapes of the sites.

        Parameters
        ----------
        vector : Tensor
            In the order of `left`, as its last dimension.
        fill : float or bool
            For elements that have been pruned before.

        Returns
        -------
        dict of Tensor
            By site, of its shape after the leading dimensions of ``vector``.
        """
        full = vector.new_full(vector.shape[:-1] + self.flat_mask.shape, fill)
        full[..., self.flat_mask] = vector
        parts = full.split([site.shape.numel() for site in self.sites], -1)
        return {
            site.name: part.reshape(vector.shape[:-1] + site.shape)
            for site, part in zip(self.sites, parts, strict=True)
        }

    def flatten(self, by_site: Mapping[str, Tensor]) -> Tensor:
        """Return the elements that are left, of one tensor per site.

        Parameters
        ----------
        by_site : mapping
            By site of the factor, a tensor that broadcasts to its shape.

        Returns
        -------
        Tensor
            In the order of `left`.
        """
        parts = [by_site[site.name].expand(site.shape).reshape(-1) for site in self.sites]
        return torch.cat(parts)[self.flat_mask]

    @property
    def flat_mask(self) -> Tensor:
        """Boolean, over all elements of all sites; True for those that ``posterior`` holds."""
        if self.mask is not None:
            return self.mask
        return torch.ones_like(self.posterior.loc, dtype=torch.bool)

    @property
    def _exact(self) -> Dense | LowRank:
        return self.posterior.to(torch.float64)

    @cached_property
    def _coupled(self) -> Correlated:
        """What is left, with its joint prior if it has one."""
        if self.joint_prior is None:
            return self._exact
        exact = self.posterior.to(torch.float64)
        dense = exact.dense() if isinstance(exact, LowRank) else exact
        return self.joint_prior.contrast(Moments(dense.loc, dense.covariance), self.flat_mask)

    @property
    def _marginal(self) -> bool:
        return self.joint_prior is not None and self.joint_prior.marginal

    def _rest(self, drop: Tensor) -> Dense | LowRank:
        """Return the posterior of what is left once more has gone."""
        left = self.conditioned().split(drop)[1]
        return left if isinstance(left, Dense | LowRank) else left.gaussian()

    def _couple(self, priors: Mapping[str, Prior]) -> JointPrior | None:
        joint = {site.name for site in self.sites if _joint_of(site, priors) is not None}
        if not joint:
            return None
        rests = {site.rest for site in self.sites if site.name in joint}
        if len(rests) > 1:
            msg = (
                f"got Spike(rest=...) of several kinds for {sorted(joint)}, whose posterior is "
                "correlated. Expected one for the sites of a correlated posterior"
            )
            raise ValueError(msg)
        parts = [_joint_of(site, priors) or site.shape.numel() for site in self.sites]
        return couple_priors(parts, rests == {"marginal"}, self.posterior.loc.device)

    @property
    def _log_prior(self) -> Tensor:
        """Of what is left; ``inf`` where there is no prior, which keeps it."""
        like = self.posterior.loc.double()
        names = [site.name for site in self.sites]
        each = self.flatten({name: self._log_density_at_zero(name).to(like) for name in names})
        if self.joint_prior is None:
            return each
        each = torch.where(
            self.joint_prior.coupled[self.flat_mask] & each.isfinite(), STANDARD, each
        )
        if not self._marginal:
            return each
        # Sets are searched among elements that can go by themselves.
        return torch.where(delta_f_spikes(self._coupled, each).isfinite(), each, torch.inf)

    def _log_density_at_zero(self, name: str) -> Tensor:
        if name in self.priors:
            return self.priors[name].log_density_at_zero
        return torch.tensor(torch.inf, device="cpu")

    def _drop(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Over the elements that the posterior holds, which go."""
        return ~self.flatten(self.kept() | dict(masks))

    def _embed(self, vector: Tensor, fill: float | bool) -> Tensor:
        """Put the elements that the posterior holds into a vector over all elements."""
        full = vector.new_full(self.flat_mask.shape, fill)
        full[self.flat_mask] = vector
        return full

    def _by_site(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([site.shape.numel() for site in self.sites])
        return {
            site.name: part.reshape(site.shape)
            for site, part in zip(self.sites, parts, strict=True)
        }

    def _reducible(self, vector: Tensor) -> dict[str, Tensor]:
        return {name: part for name, part in self._by_site(vector).items() if name in self.priors}


def meet_priors(factors: Iterable[Factor], priors: Mapping[str, Prior]) -> tuple[Factor, ...]:
    """Give factors the priors of their sites; under a correlated one, factors are joint."""
    return tuple(_as_joint(factor, priors).with_priors(priors) for factor in factors)


def as_held(factor: Factor) -> Factor:
    """Return a factor as the guide holds it, whatever prior it has met."""
    if isinstance(factor, JointFactor) and factor.independent is not None:
        return factor.independent
    return factor


def to_joint(factor: Factor) -> JointFactor:
    """Return a Gaussian factor as a joint one."""
    if isinstance(factor, JointFactor):
        return factor
    ((name, kept),) = factor.kept().items()
    marginal = factor.marginals()[name]
    mask = kept.reshape(-1)
    loc, scale = (t.reshape(-1)[mask] for t in (marginal.loc, marginal.scale))
    return JointFactor(factor.sites, Dense(loc, scale.diag()), None if mask.all() else mask)


def _as_joint(factor: Factor, priors: Mapping[str, Prior]) -> Factor:
    joint = any(_joint_of(site, priors) is not None for site in factor.sites)
    if not (joint and isinstance(factor, IndependentFactor)):
        return factor
    return replace(to_joint(factor), independent=factor)


def _joint_of(site: Site, priors: Mapping[str, Prior]) -> Moments | None:
    return priors[site.name].joint if site.name in priors else None


def _take_site(site: Site, kept: Indices, left: Mapping[str, Tensor]) -> Site:
    """Take some of a site, whose center is computed from what is left of other sites."""
    taken = site.take(kept)
    if taken.center is None:
        return taken
    weights = {n: weight[:, left[n].reshape(-1)] for n, weight in taken.center.weights.items()}
    return replace(taken, center=replace(taken.center, weights=weights))
