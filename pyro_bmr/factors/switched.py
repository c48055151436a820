"""Factors whose elements may take a reduced prior other than the spike: nothing becomes zero.

They answer the questions of `Factor` with "take the reduced prior" in the place of "be dropped".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Normal
from typing_extensions import override

from pyro_bmr.factors.factor import Factor, Normals, Prior, Search, Terms
from pyro_bmr.factors.independent import IndependentFactor, independent_terms
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.evidence import delta_f_gaussian, total_dropped
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.mathematics.laplace import reduce_to_laplace
from pyro_bmr.mathematics.reduced_posteriors import reduced_gaussian
from pyro_bmr.mathematics.reduced_priors import Gaussian, Laplace, ReducedPrior, Spike
from pyro_bmr.mathematics.shrinkage import noisy_copy, shrink
from pyro_bmr.programs.sites import Indices
from pyro_bmr.programs.switching import NewPrior


def with_reduced_priors(
    factors: tuple[Factor, ...], reduced: Mapping[str, ReducedPrior]
) -> tuple[Factor, ...]:
    """Make factors score and take reduced priors; ValueError if a correlated one cannot."""
    return tuple(
        _switched(factor, {name: reduced[name] for name in factor.priors}) for factor in factors
    )


@dataclass(frozen=True)
class SwitchedFactor(Factor):
    """A factor with Gaussian priors and, by site, the reduced priors that elements may take."""

    factor: Any
    reduced: Mapping[str, Gaussian | Laplace]

    @property
    def sites(self) -> Any:
        """The sites that it holds."""
        return self.factor.sites

    @property
    def priors(self) -> Mapping[str, Prior]:
        """See `Factor.priors`."""
        return self.factor.priors

    @override
    def check(self) -> None:
        self.factor.check()

    @override
    def locations(self) -> dict[str, Tensor]:
        return self.factor.locations()

    @override
    def marginals(self) -> dict[str, Diagonal]:
        return self.factor.marginals()

    @override
    def kept(self) -> dict[str, Tensor]:
        return self.factor.kept()

    @override
    def draws(self, names: Collection[str], normals: Normals) -> Iterator[dict[str, Tensor]]:
        return self.factor.draws(names, normals)

    @override
    def with_priors(self, priors: Mapping[str, Prior]) -> SwitchedFactor:
        return replace(self, factor=self.factor.with_priors(priors))

    @override
    def take(self, kept: Mapping[str, Indices]) -> Factor:
        return self.factor.take(kept)

    @property
    @abstractmethod
    def refusal(self) -> str:
        """Why an element with a prior may be unable to take the reduced one."""

    def refused(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Count, by site, the elements with a prior that cannot take the reduced one."""
        closed = {name: scores[name].isposinf() for name in self.priors}
        finite = {name: prior.log_density_at_zero.isfinite() for name, prior in self.priors.items()}
        return {
            name: int((one & finite[name].to(one.device)).sum()) for name, one in closed.items()
        }

    @abstractmethod
    def switch(self, masks: Mapping[str, Tensor]) -> tuple[float, Factor]:
        """Return ΔF in nats of taking the reduced prior where masks are False, and what remains.

        Unlike `Factor.delta_f` it takes also priors that are wider, wherever the reduced
        posterior is proper.
        """

    def new_priors(self, masks: Mapping[str, Tensor]) -> dict[str, NewPrior]:
        """Return, by site, the priors that elements take where masks are False."""
        locations = self.locations()
        return {
            name: NewPrior(masks[name], *_AS_PRIOR[type(one)](one, locations[name]))
            for name, one in self.reduced.items()
        }


@dataclass(frozen=True)
class _SwitchedIndependent(SwitchedFactor):
    """Independent Gaussians at one site, and the reduced prior that they may take one by one."""

    @property
    def refusal(self) -> str:
        """See `SwitchedFactor.refusal`."""
        return "with an improper reduced posterior"

    @override
    def scores(self) -> dict[str, Tensor]:
        scores = self._reduction[0].to(self.factor.loc.dtype)
        if self.factor.mask is not None:
            scores = torch.where(self.factor.mask, scores, 0)
        return {self._name: scores}

    @override
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self._name: scores[self._name]}

    @override
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        return {self._name: scores[self._name] > -margin}

    @override
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        return independent_terms(self, scores, index)

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return {self._name: total_dropped(scores[self._name], masks[self._name])}

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> IndependentFactor:
        return self.factor.replaced(self._reduction[1], ~masks[self._name])

    @override
    def switch(self, masks: Mapping[str, Tensor]) -> tuple[float, Factor]:
        return total_dropped(self._reduction[0], masks[self._name]), self.prune(masks)

    @property
    def _name(self) -> str:
        return self.factor.site.name

    @cached_property
    def _reduction(self) -> tuple[Tensor, Diagonal]:
        """By element, ΔF in float64 and the reduced posterior."""
        prior, reduced = self.priors[self._name], self.reduced[self._name]
        gaussian = _on(self.factor.loc, prior)
        scores, after = _REDUCE[type(reduced)](self.factor.stored, gaussian, reduced)
        scores = scores + _excess(prior).to(scores.device)
        return torch.where(scores.isnan(), torch.inf, scores), after


@dataclass(frozen=True)
class _SwitchedJoint(SwitchedFactor):
    """A correlated Gaussian, and the Gaussian priors that its elements may take together."""

    @property
    def refusal(self) -> str:
        """See `SwitchedFactor.refusal`."""
        return "with a reduced prior that is not narrower than the prior"

    @override
    def scores(self) -> dict[str, Tensor]:
        return self._rounded(self._copy.scores())

    @override
    def elimination(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._copy.elimination(scores)

    @override
    def search(
        self, scores: Mapping[str, Tensor], choose: Search, margin: float
    ) -> dict[str, Tensor]:
        return self._copy.search(scores, choose, margin)

    @override
    def terms(self, scores: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Terms:
        return self._copy.terms(scores, index)

    @override
    def delta_f(
        self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, float]:
        return self._copy.delta_f(scores, masks)

    @override
    def prune(self, masks: Mapping[str, Tensor]) -> Factor:
        return self.switch(masks)[1]

    @override
    def switch(self, masks: Mapping[str, Tensor]) -> tuple[float, Factor]:
        take = ~self.factor.flatten(self.kept() | dict(masks))
        prior, reduced = self._prior, self._reduced
        changed = Diagonal(
            torch.where(take, reduced.loc, prior.loc), torch.where(take, reduced.scale, prior.scale)
        )
        delta_f, after = shrink(self._exact, prior, changed)
        excess = sum(
            total_dropped(_excess(prior).to(take.device).expand(masks[name].shape), masks[name])
            for name, prior in self.priors.items()
            if name in masks
        )
        after = after.to(self.factor.posterior.loc.dtype)
        return delta_f + excess, replace(self.factor, posterior=after)

    @cached_property
    def _copy(self) -> JointFactor:
        """A factor whose spikes are the reduced priors of this one."""
        copy, log_prior = noisy_copy(self._exact, self._prior, self._reduced)
        by_site = self.factor.spread(log_prior, torch.inf)
        priors = {
            name: Prior(by_site[name] + _excess(prior).to(log_prior.device))
            for name, prior in self.priors.items()
        }
        return JointFactor(self.sites, copy, self.factor.mask, priors)

    @property
    def _exact(self) -> Dense | LowRank:
        return self.factor.posterior.to(torch.float64)

    @property
    def _prior(self) -> Diagonal:
        like = self.factor.posterior.loc.double()
        return self._gathered({name: _on(like, prior) for name, prior in self.priors.items()})

    @property
    def _reduced(self) -> Diagonal:
        like = self.factor.posterior.loc.double()
        return self._gathered(
            {
                name: Diagonal(*(_like(t, like) for t in (one.loc, one.scale)))
                for name, one in self.reduced.items()
                if isinstance(one, Gaussian)
            }
        )

    def _gathered(self, by_site: Mapping[str, Diagonal]) -> Diagonal:
        like = self.factor.posterior.loc.double()
        standard = Diagonal(like.new_zeros(()), like.new_ones(()))
        full = {site: by_site.get(site.name, standard) for site in self.sites}
        return Diagonal(
            self.factor.flatten({s.name: g.loc.expand(s.shape) for s, g in full.items()}),
            self.factor.flatten({s.name: g.scale.expand(s.shape) for s, g in full.items()}),
        )

    def _rounded(self, by_site: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.factor.posterior.loc.dtype
        return {name: values.to(dtype) for name, values in by_site.items()}


def _switched(factor: Factor, reduced: Mapping[str, ReducedPrior]) -> Factor:
    others = {name: one for name, one in reduced.items() if not isinstance(one, Spike)}
    if not others:
        return factor
    if isinstance(factor, IndependentFactor):
        return _SwitchedIndependent(factor, others)
    laplace = [name for name, one in others.items() if isinstance(one, Laplace)]
    if laplace:
        msg = (
            f"got a Laplace reduced prior for the sites {sorted(laplace)}, whose posterior is "
            "correlated: the reduced posterior has no closed form. Expected Gaussian(loc, scale) "
            "or Spike() there, a guide with independent elements such as AutoNormal, or sites= "
            "without these"
        )
        raise ValueError(msg)
    if len(others) < len(reduced):
        msg = (
            f"got Spike() for {sorted(reduced.keys() - others.keys())} and Gaussian reduced priors "
            f"for {sorted(others)}, which are correlated. Expected one kind for the sites of a "
            "correlated posterior: reduce twice, the second time result.guide"
        )
        raise ValueError(msg)
    return _SwitchedJoint(factor, others)


def _on(like: Tensor, prior: Prior) -> Diagonal:
    gaussian: Any = prior.gaussian
    return Diagonal(gaussian.loc.to(like.device), gaussian.scale.to(like.device))


def _excess(prior: Prior) -> Tensor:
    # How far ln p is above that of its Gaussian: 0 but for a prior that depends on other sites,
    # whose expectation is quadratic and not normalised; inf where an element has no prior.
    gaussian: Any = prior.gaussian
    normal = Normal(gaussian.loc, gaussian.scale, validate_args=False)
    return prior.log_density_at_zero - normal.log_prob(torch.zeros_like(gaussian.loc))


def _to_gaussian(posterior: Diagonal, prior: Diagonal, reduced: Gaussian) -> Any:
    loc, scale = (_like(t, prior.loc) for t in (reduced.loc, reduced.scale))
    three = posterior, prior, Diagonal(loc, scale)
    return delta_f_gaussian(*three), reduced_gaussian(*three)


def _to_laplace(posterior: Diagonal, prior: Diagonal, reduced: Laplace) -> Any:
    return reduce_to_laplace(posterior, prior, _like(reduced.scale, prior.loc))


def _like(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _gaussian_prior(reduced: Gaussian, like: Tensor) -> Any:
    loc, scale = (_like(t, like) for t in (reduced.loc, reduced.scale))
    return dist.Normal, {"loc": loc, "scale": scale}


def _laplace_prior(reduced: Laplace, like: Tensor) -> Any:
    scale = _like(reduced.scale, like)
    return dist.Laplace, {"loc": torch.zeros_like(scale), "scale": scale}


_REDUCE: dict[type, Callable[..., tuple[Tensor, Diagonal]]] = {
    Gaussian: _to_gaussian,
    Laplace: _to_laplace,
}
_AS_PRIOR: dict[type, Callable[..., Any]] = {Gaussian: _gaussian_prior, Laplace: _laplace_prior}
