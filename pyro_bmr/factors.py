"""Factors: the independent pieces of a posterior, each a Gaussian over named sample sites.

ΔF adds across factors, never inside a correlated one. Both kinds of factor answer the same
questions: what is the marginal of each element, what does dropping it by itself do, in which
order should elements go, what did dropping these together do, and what remains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to, transform_to
from typing_extensions import override

from pyro_bmr.elimination import eliminate
from pyro_bmr.evidence import delta_f_spike, delta_f_spike_chain, total_dropped
from pyro_bmr.gaussian import Dense, Diagonal
from pyro_bmr.sweep import sweep


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
        return biject_to(self.support)(unconstrained)


@dataclass(frozen=True)
class Factor(ABC):
    """One Gaussian over one or more sample sites, with the prior of those that may be reduced."""

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The sites that it holds."""

    @property
    @abstractmethod
    def log_prior(self) -> Mapping[str, Tensor]:
        """By site, ln p(θ = 0) in nats; a site that is not here stays whole."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if a location or a scale is not finite, or a scale not positive."""

    @abstractmethod
    def locations(self) -> dict[str, Tensor]:
        """By site, the posterior mean in unconstrained coordinates; 0 if pruned."""

    @abstractmethod
    def marginals(self) -> dict[str, Diagonal]:
        """By site, the marginal of each element in unconstrained coordinates; 0 ± 0 if pruned."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """By site, True where an element has not been pruned before."""

    @abstractmethod
    def with_log_prior(self, log_prior: Mapping[str, Tensor]) -> Factor:
        """Return the factor with the prior of the sites that may be reduced."""

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """By reducible site, ΔF in nats of dropping each element by itself; 0 if pruned before."""

    @abstractmethod
    def elimination(self, scores: Mapping[str, Tensor], stop: float) -> dict[str, Tensor]:
        """By reducible site, the ΔF at which each element falls when the best one goes first.

        Parameters
        ----------
        scores : mapping
            What `scores` returned.
        stop : float
            Nats; elements beyond are not searched and get ``inf``.
        """

    @abstractmethod
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """By site of ``masks``, its part of the joint ΔF in nats of all that is dropped."""

    @abstractmethod
    def prune(self, masks: Mapping[str, Tensor]) -> Factor:
        """Return what remains: the posterior given that all dropped elements are 0.

        What was pruned before stays pruned, whatever its mask says now.
        """


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
    log_prior_at_zero : Tensor, optional
        In nats; broadcasts to the site's shape.

    Examples
    --------
    >>> site = Site("w", torch.Size([2]))
    >>> factor = IndependentFactor(site, torch.tensor([0.0, 3.0]), torch.ones(2))
    >>> factor.with_log_prior({"w": torch.tensor(-1.0)}).scores()["w"]
    tensor([-0.0811,  4.4189])
    """

    site: Site
    loc: Tensor
    scale: Tensor
    scale_constraint: constraints.Constraint | None = None
    mask: Tensor | None = None
    log_prior_at_zero: Tensor | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site."""
        return (self.site,)

    @property
    def log_prior(self) -> Mapping[str, Tensor]:
        """See `Factor.log_prior`."""
        if self.log_prior_at_zero is None:
            return {}
        return {self.site.name: self.log_prior_at_zero}

    @override
    def check(self) -> None:
        name = self.site.name
        check_finite(name, "location", self.loc)
        check_finite(name, "scale", self.scale)
        # The extremes of what the guide optimises are the extremes of the scale.
        if self.scale.numel() and not (self._scale_transform(_extremes(self.scale)) > 0).all():
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
        everything = torch.ones((), dtype=torch.bool, device=self.loc.device).expand(self.loc.shape)
        return {self.site.name: everything if self.mask is None else self.mask}

    @override
    def with_log_prior(self, log_prior: Mapping[str, Tensor]) -> IndependentFactor:
        return replace(self, log_prior_at_zero=log_prior.get(self.site.name))

    @override
    def scores(self) -> dict[str, Tensor]:
        if self.log_prior_at_zero is None:
            return {}
        stored = Diagonal(self.loc, self.scale)
        scores = delta_f_spike(stored, self.log_prior_at_zero, self._scale_transform)
        if self.mask is not None:
            scores = torch.where(self.mask, scores, 0)
        return {self.site.name: scores}

    @override
    def elimination(self, scores: Mapping[str, Tensor], stop: float) -> dict[str, Tensor]:
        return {name: scores[name] for name in self.log_prior}

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        name = self.site.name
        return {name: total_dropped(scores[name], masks[name])} if name in masks else {}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> IndependentFactor:
        mask = masks.get(self.site.name)
        if mask is None:
            return self
        return replace(self, mask=mask if self.mask is None else mask & self.mask)

    @property
    def _scale_transform(self) -> Callable[[Tensor], Tensor]:
        return transform_to(self.scale_constraint or constraints.real)


@dataclass(frozen=True)
class JointFactor(Factor):
    """One Gaussian over several sites with its full covariance, as in ``AutoMultivariateNormal``.

    Parameters
    ----------
    joint_sites : tuple of Site
        The sites; their flattened values follow one another in the vector.
    posterior : Dense
        Over the elements that have not been pruned before.
    mask : Tensor
        Boolean, over all elements of all sites; True for those that ``posterior`` holds.
    log_prior_at_zero : mapping
        By site, in nats; broadcasts to the site's shape.

    Examples
    --------
    >>> sites = (Site("a", torch.Size([1])), Site("b", torch.Size([1])))
    >>> q = Dense(torch.zeros(2), torch.eye(2) / 2)
    >>> JointFactor(sites, q).marginals()["b"].scale
    tensor([0.5000])
    """

    joint_sites: tuple[Site, ...]
    posterior: Dense
    mask: Tensor | None = None
    log_prior_at_zero: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of the vector."""
        return self.joint_sites

    @property
    def log_prior(self) -> Mapping[str, Tensor]:
        """See `Factor.log_prior`."""
        return self.log_prior_at_zero

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
        return self._by_site(self._mask)

    @override
    def with_log_prior(self, log_prior: Mapping[str, Tensor]) -> JointFactor:
        mine = {site.name: log_prior[site.name] for site in self.sites if site.name in log_prior}
        return replace(self, log_prior_at_zero=mine)

    @override
    def scores(self) -> dict[str, Tensor]:
        alone = delta_f_spike(self._exact.marginals(), self._log_prior[self._mask])
        return self._reducible(self._embed(alone.to(self.posterior.loc.dtype), 0.0))

    @override
    def elimination(self, scores: Mapping[str, Tensor], stop: float) -> dict[str, Tensor]:
        path = eliminate(self._exact, self._log_prior[self._mask], stop)
        return self._reducible(self._embed(path.to(self.posterior.loc.dtype), -torch.inf))

    @override
    def delta_f(
        self,
        scores: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
    ) -> dict[str, float]:
        drop = self._drop(masks)
        gone, _ = self._exact.split(drop)
        parts = torch.zeros_like(self._log_prior[self._mask])
        parts[drop] = delta_f_spike_chain(gone, self._log_prior[self._mask][drop])
        by_site = self._by_site(self._embed(parts, 0.0))
        return {name: float(part.sum()) for name, part in by_site.items() if name in masks}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> JointFactor:
        drop = self._drop(masks)
        _, rest = self._exact.split(drop)
        dtype = self.posterior.loc.dtype
        rest = Dense(rest.loc.to(dtype), rest.scale_tril.to(dtype))
        return replace(self, posterior=rest, mask=self._embed(~drop, False))

    @property
    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones_like(self.posterior.loc, dtype=torch.bool)

    @property
    def _exact(self) -> Dense:
        return Dense(self.posterior.loc.double(), self.posterior.scale_tril.double())

    @property
    def _log_prior(self) -> Tensor:
        """Over all elements; ``inf`` where there is no prior, which keeps them."""
        like = self.posterior.loc.double()
        return torch.cat(
            [
                self.log_prior.get(site.name, like.new_tensor(torch.inf))
                .to(like)
                .expand(site.shape)
                .reshape(-1)
                for site in self.sites
            ]
        )

    def _drop(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Over the elements that the posterior holds, which go."""
        kept = self.kept() | dict(masks)
        return ~torch.cat([kept[site.name].reshape(-1) for site in self.sites])[self._mask]

    def _embed(self, vector: Tensor, fill: float | bool) -> Tensor:
        """Put the elements that the posterior holds into a vector over all elements."""
        full = vector.new_full(self._mask.shape, fill)
        full[self._mask] = vector
        return full

    def _by_site(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([site.shape.numel() for site in self.sites])
        return {
            site.name: part.reshape(site.shape)
            for site, part in zip(self.sites, parts, strict=True)
        }

    def _reducible(self, vector: Tensor) -> dict[str, Tensor]:
        return {
            name: part for name, part in self._by_site(vector).items() if name in self.log_prior
        }


def _write_kept(_: None, values: Tensor, kept: Tensor, out: Tensor) -> None:
    # As bytes, a mask is many times faster to multiply by than as booleans.
    out.copy_(values * kept)


def _extremes(values: Tensor) -> Tensor:
    return torch.stack(torch.aminmax(values))


def check_finite(name: str, what: str, values: Tensor) -> None:
    """Look for values that are not numbers.

    Parameters
    ----------
    name : str
        A site.
    what : str
        What the values are to it.
    values : Tensor
        Any.

    Raises
    ------
    ValueError
        If a value is NaN or infinite.

    Examples
    --------
    >>> check_finite("w", "location", torch.zeros(2))
    """
    if values.numel() and not _extremes(values).isfinite().all():
        msg = (
            f"the guide's {what} of the site {name!r} is NaN or infinite in "
            f"{int((~values.isfinite()).sum())} of {values.numel()} elements. Expected a guide "
            "that was trained to finite values: look for a NaN loss, a learning rate that is too "
            "high, or NaN in the data"
        )
        raise ValueError(msg)


def check_positive(name: str, scale: Tensor) -> None:
    """Look for scales that are not positive.

    Parameters
    ----------
    name : str
        A site.
    scale : Tensor
        Its scales.

    Raises
    ------
    ValueError
        If a value is zero or negative.

    Examples
    --------
    >>> check_positive("w", torch.ones(2))
    """
    bad = int((scale <= 0).sum())
    if bad:
        msg = (
            f"the guide's scale of the site {name!r} is zero or negative in {bad} of "
            f"{scale.numel()} elements. Expected positive scales, which in float32 vanish below "
            "1e-45: train in float64 or with a smaller learning rate"
        )
        raise ValueError(msg)
