"""The guide that a reduction returns: Gaussian factors with pruned elements at exactly zero."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_bmr.factors.centering import value_marginals
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor, as_held
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.guide_program import GuideProgram
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.programs.centers import Center
from pyro_bmr.programs.distributions import PrunedDistribution
from pyro_bmr.programs.handlers import module_key
from pyro_bmr.programs.own_names import OwnNames, unused_name
from pyro_bmr.programs.site_sampling import inside_plates, make_plates, sample_site, sample_sites
from pyro_bmr.programs.sites import Site
from pyro_bmr.programs.streams import Stream


@dataclass(frozen=True)
class Origin:
    """The model that a guide was made for, how it was first called, and what of it is still run.

    The model is without the handlers that an autoguide puts around it, and None if it is lost. A
    guide that is made of it runs a copy of ``program``. Where the arguments are an example of more
    rows than fit into memory, ``stream`` reads these. ``columns`` are the names of the columns of
    the data, if they came as a table.
    """

    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    create_plates: Callable[..., Any] | None = None
    program: GuideProgram | None = None
    stream: Stream | None = None
    columns: tuple[str, ...] = ()
    moments: Any = None

    def make_plates(self, parts: Iterable[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Build the plates of a guide for the model, by name, for parts with ``sites``."""
        created = () if self.create_plates is None else self.create_plates(*args, **kwargs)
        return make_plates(parts, created)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Origin:
        """Bind arguments to the model, which the first call had among its own."""
        if not (args or kwargs):
            return self
        programs = (self.model, self.create_plates)
        model, create_plates = (p and partial(p, *args, **kwargs) for p in programs)
        left = {name: value for name, value in self.kwargs.items() if name not in kwargs}
        rest = self.args[len(args) :]
        return replace(self, model=model, args=rest, kwargs=left, create_plates=create_plates)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Return itself: the copy of a guide is a guide for the same model."""
        return self


class PrunedGuide(OwnNames):
    r"""A guide of independent Gaussian factors, in which pruned elements are exactly zero.

    .. math:: q(\theta) = \delta(\theta_S) \prod_f N(\theta_f \mid \mu_f, \Sigma_f)

    It draws like the guide that it comes from, takes the arguments of the model, has parameters of
    its own under names of its own, and can be trained, copied, moved and reduced again. No
    parameter reaches a pruned element. Of a guide that was written by hand, or of a list of guides,
    what was not reduced or is not Gaussian is run as it is: modules, such as autoguides, as copies
    with parameters of their own, functions with those that they have in Pyro's param store.

    Parameters
    ----------
    factors : sequence of Factor
        The posterior; its tensors are copied.
    origin : Origin
        The model that the guide is for.

    Examples
    --------
    >>> site = Site("w", torch.Size([2]))
    >>> mask = torch.tensor([True, False])
    >>> factor = IndependentFactor(site, torch.ones(2), torch.ones(2), mask=mask)
    >>> PrunedGuide([factor], Origin()).median()
    {'w': tensor([1., 0.])}
    """

    def __init__(self, factors: tuple[Factor, ...], origin: Origin) -> None:
        super().__init__(unused_name("PrunedGuide"))
        self.program = copy.deepcopy(origin.program)
        self._origin = replace(origin, program=None)
        self.factors = PyroModule()
        for factor in factors:
            key = "+".join(module_key(site.name) for site in factor.sites)
            setattr(self.factors, key, _module(factor))

    @property
    def origin(self) -> Origin:
        """The model that the guide is for, how it is called, and what the guide runs."""
        return replace(self._origin, program=self.program)

    @property
    def model(self) -> Callable[..., Any] | None:
        """The full model, as `pyro.infer.autoguide.AutoGuide.model`."""
        return self._origin.model

    @property
    def parts(self) -> tuple[Any, ...]:
        """One module per factor; ``part.factor()`` reads it."""
        return tuple(self.factors.children())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site.

        Parameters
        ----------
        *args, **kwargs
            Those of the model.

        Returns
        -------
        dict of Tensor
            One value per site.
        """
        plates = self._origin.make_plates(self.parts, *args, **kwargs)
        values = {name: value for part in self.parts for name, value in part(plates)}
        if self.program is not None:
            values |= self.program.run(values, plates, args, kwargs)
        return values

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every site.

        Parameters
        ----------
        *args, **kwargs
            As in `pyro.infer.autoguide.AutoNormal.median`: only used by what is run.

        Returns
        -------
        dict of Tensor
            One value per site, 0 where pruned; none of what is run, unless it is an autoguide.
        """
        own = {
            site.name: site.constrain(marginal.loc).clone() for site, marginal in self._marginals()
        }
        if self.program is None:
            return own
        plates = self._origin.make_plates(self.parts, *args, **kwargs)
        return {**self.program.median(plates, args, kwargs), **own}

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Tensor | list[float],
        *_args: Any,
        **_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return posterior quantiles of every site.

        Parameters
        ----------
        quantiles : Tensor or list of float
            Between 0 and 1.
        *_args, **_kwargs
            Not used; as in `pyro.infer.autoguide.AutoNormal.quantiles`.

        Returns
        -------
        dict of Tensor
            By site, of shape ``(len(quantiles), *site)``, 0 where pruned.
        """
        result = {}
        for site, marginal in self._marginals():
            levels = torch.as_tensor(quantiles, device="cpu").to(marginal.loc)
            levels = levels.reshape(-1, *[1] * len(site.shape))
            steps = torch.special.ndtri(levels)
            offset = torch.where(marginal.scale > 0, steps * marginal.scale, 0)
            result[site.name] = site.constrain(marginal.loc + offset)
        return result

    def _marginals(self) -> Iterator[tuple[Site, Diagonal]]:
        for part in self.parts:
            factor = part.factor()
            if isinstance(factor, ProgramFactor):
                continue
            marginals = value_marginals(factor)
            for site in factor.sites:
                yield replace(site, center=None), marginals[site.name]


def latent_name(sites: tuple[Site, ...]) -> str:
    """Name the statement that draws what remains of correlated sites."""
    return "+".join(site.name for site in sites) + "_latent"


class _IndependentPart(PyroModule):
    def __init__(self, factor: IndependentFactor) -> None:
        super().__init__()
        self.site = factor.site
        self.mask: Tensor | None
        self.register_buffer("mask", None if factor.mask is None else factor.mask.clone())
        event_dim = factor.site.event_dim
        constraint = factor.scale_constraint or constraints.softplus_positive
        (loc,) = factor.locations().values()
        self.loc = PyroParam(
            loc.clone() if factor.mask is None else loc, constraints.real, event_dim
        )
        if factor.scale_constraint is None:
            self.scale = PyroParam(factor.scale.detach().clone(), constraint, event_dim)
        else:
            self.scale = PyroParam(factor.scale.new_ones(()), constraint, event_dim)
            self.scale_unconstrained.data = factor.scale.detach().clone()

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def factor(self) -> IndependentFactor:
        constraint, _ = self._pyro_params["scale"]
        return IndependentFactor(
            self.site,
            self.loc_unconstrained.detach(),
            self.scale_unconstrained.detach(),
            constraint,
            self.mask,
        )

    def forward(self, plates: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        kept = None
        with inside_plates(self.site, plates):
            center = self._center()
            loc = self.loc if center is None else self.loc + center.offset.nan_to_num(neginf=0)
            fn = dist.Normal(loc, self.scale)
            if self.mask is not None:
                kept = pyro.subsample(self.mask, event_dim=self.site.event_dim)
                fn = PrunedDistribution(fn, kept, center)
            value = pyro.sample(
                f"{self.site.name}_unconstrained",
                fn.to_event(self.site.event_dim),
                infer={"is_auxiliary": True},
            )
        yield self.site.name, sample_site(replace(self.site, center=None), value, plates, kept)

    def _center(self) -> Center | None:
        """Return the rows of the center that are drawn, as numbers."""
        if self.site.center is None:
            return None
        offset = pyro.subsample(self.site.center.offset, event_dim=self.site.event_dim)
        return Center(offset.to(self.loc), torch.zeros_like(offset, dtype=torch.bool))


class _JointPart(PyroModule):
    """Draws a vector of what is kept of its sites; the scale of each element is a parameter."""

    def __init__(self, factor: JointFactor, scale: Tensor) -> None:
        super().__init__()
        self.sites = factor.sites
        self.mask: Tensor | None
        self.register_buffer("mask", None if factor.mask is None else factor.mask.clone())
        self.loc = PyroParam(factor.posterior.loc.detach().clone(), constraints.real, 1)
        self.scale = PyroParam(scale.detach().clone(), constraints.softplus_positive, 1)

    @abstractmethod
    def posterior(self) -> Dense | LowRank:
        """Return the Gaussian over what is kept."""

    @abstractmethod
    def distribution(self) -> Any:
        """Return the same as a distribution of Pyro."""

    @torch.no_grad()
    def factor(self) -> JointFactor:
        return JointFactor(self.sites, self.posterior(), self.mask)

    def forward(self, plates: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        latent = self.loc
        if latent.numel():
            latent = pyro.sample(
                latent_name(self.sites),
                self.distribution(),
                infer={"is_auxiliary": True},
            )
        yield from sample_sites(self.sites, latent, self.mask, plates)


class _DensePart(_JointPart):
    def __init__(self, factor: JointFactor, posterior: Dense) -> None:
        tril = posterior.scale_tril.detach()
        scale = tril.diagonal()
        super().__init__(factor, scale)
        self.scale_tril = PyroParam(tril / scale[:, None], constraints.unit_lower_cholesky, 2)

    def posterior(self) -> Dense:
        return Dense(self.loc.detach(), self.scale[:, None] * self.scale_tril)

    def distribution(self) -> Any:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale[:, None] * self.scale_tril)


class _LowRankPart(_JointPart):
    def __init__(self, factor: JointFactor, posterior: LowRank) -> None:
        scale = posterior.cov_diag.detach().sqrt()
        super().__init__(factor, scale)
        cov_factor = posterior.cov_factor.detach() / scale[:, None]
        self.cov_factor = PyroParam(cov_factor, constraints.real, 2)

    def posterior(self) -> LowRank:
        scale = self.scale
        return LowRank(self.loc.detach(), scale[:, None] * self.cov_factor, scale.square())

    def distribution(self) -> Any:
        cov_factor = self.scale[:, None] * self.cov_factor
        return dist.LowRankMultivariateNormal(self.loc, cov_factor, self.scale.square())


class _GammaPart(PyroModule):
    def __init__(self, factor: GammaFactor) -> None:
        super().__init__()
        self.site = factor.site
        self.mask: Tensor | None
        self.register_buffer("mask", None if factor.mask is None else factor.mask.clone())
        for name, value in (("concentration", factor.concentration), ("mean", factor.mean)):
            parameter = PyroParam(value.clone(), constraints.positive, factor.site.event_dim)
            setattr(self, name, parameter)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def factor(self) -> GammaFactor:
        concentration, mean = self.concentration.detach(), self.mean.detach()
        return GammaFactor(self.site, concentration, mean, self.mask)

    def forward(self, plates: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        with inside_plates(self.site, plates):
            concentration = self.concentration
            fn = dist.Gamma(concentration, concentration / self.mean)
            if self.mask is not None:
                fn = PrunedDistribution(fn, self.mask, self.site.center)
            yield self.site.name, pyro.sample(self.site.name, fn.to_event(self.site.event_dim))


class _ProgramPart(PyroModule):
    """Holds the place of a site that is drawn by what is run."""

    def __init__(self, factor: ProgramFactor) -> None:
        super().__init__()
        self._factor = factor
        self.values: Tensor
        self.register_buffer("values", factor.values, persistent=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return ()

    def factor(self) -> ProgramFactor:
        return replace(self._factor, values=self.values)

    def forward(self, _plates: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        return iter(())


_MODULES = {
    IndependentFactor: _IndependentPart,
    GammaFactor: _GammaPart,
    ProgramFactor: _ProgramPart,
}
_JOINT_MODULES = {Dense: _DensePart, LowRank: _LowRankPart}


def _module(factor: Factor) -> Any:
    factor = as_held(factor)
    if isinstance(factor, JointFactor):
        return _JOINT_MODULES[type(factor.posterior)](factor, factor.posterior)
    return _MODULES[type(factor)](factor)
