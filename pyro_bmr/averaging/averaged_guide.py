"""The guide of a Bayesian model average: it draws a reduced model, then its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_bmr.averaging.subset_mixtures import SubsetMixture, draw_models
from pyro_bmr.factors.factor import Factor
from pyro_bmr.guides.families import read_factors
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.statements import NotGaussianError
from pyro_bmr.mathematics.gaussian import Dense, Diagonal, LowRank
from pyro_bmr.programs.handlers import module_key
from pyro_bmr.programs.own_names import unused_name
from pyro_bmr.programs.site_sampling import inside_plates, sample_site, sample_sites
from pyro_bmr.programs.sites import Site


class AveragedGuide(PyroModule):
    r"""A mixture of the posteriors of reduced models, each drawn as often as it is probable.

    .. math:: q(\theta) = \sum_S P(S) \, \delta(\theta_S) \, q(\theta_R \mid \theta_S = 0)

    It takes the arguments of the model and goes with the full model in
    `pyro.infer.Predictive`. It is not for training: an absent element has no density that an
    optimiser could follow.

    Parameters
    ----------
    parts : sequence of Module
        ``SpikeAndSlab`` and ``Mixture`` modules, or parts of a `pyro_bmr.extend.PrunedGuide`.
    origin : Origin
        The model that the guide is for.

    Examples
    --------
    >>> slab = Diagonal(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.1]))
    >>> part = SpikeAndSlab(Site("w", torch.Size([2]), 1), slab, torch.tensor([0.0, 0.5]))
    >>> float(AveragedGuide([part], Origin())()["w"][0])
    0.0
    """

    def __init__(self, parts: list[Any], origin: Origin) -> None:
        super().__init__(unused_name("AveragedGuide"))
        self.program = copy.deepcopy(origin.program)
        self.origin = replace(origin, program=None)
        self.factors = PyroModule()
        # What is run has no part that draws it.
        for part in (part for part in parts if part.sites):
            setattr(self.factors, "+".join(module_key(site.name) for site in part.sites), part)

    @property
    def model(self) -> Callable[..., Any] | None:
        """The full model, as `pyro.infer.autoguide.AutoGuide.model`."""
        return self.origin.model

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site.

        Parameters
        ----------
        *args, **kwargs
            Those of the model.

        Returns
        -------
        dict of Tensor
            By site, its value.
        """
        parts = tuple(self.factors.children())
        plates = self.origin.make_plates(parts, *args, **kwargs)
        values = {name: value for part in parts for name, value in part(plates)}
        if self.program is not None:
            values |= self.program.run(values, plates, args, kwargs)
        return values


@read_factors.register
def _(guide: AveragedGuide) -> tuple[Factor, ...]:
    msg = (
        f"the {type(guide).__name__} is a mixture, not a Gaussian. Expected the guide that was "
        "averaged: reduce that"
    )
    raise NotGaussianError(msg)


class SpikeAndSlab(PyroModule):
    """Independent elements at one site, each Gaussian (``slab``) with a probability, else zero."""

    def __init__(self, site: Site, slab: Diagonal, probability: Tensor) -> None:
        super().__init__()
        self.site = site
        self.register_buffer("probability", probability)
        self.register_buffer("loc", slab.loc)
        # What was pruned before has the scale 0, and is never present.
        self.register_buffer("scale", torch.where(slab.scale > 0, slab.scale, 1))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The one site."""
        return (self.site,)

    def forward(self, plates: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Sample the site; yield its name and its value."""
        name, event_dim = self.site.name, self.site.event_dim
        with inside_plates(self.site, plates):
            probability, loc, scale = (
                pyro.subsample(self.get_buffer(key), event_dim=event_dim)
                for key in ("probability", "loc", "scale")
            )
            auxiliary = {"is_auxiliary": True}
            present = pyro.sample(
                f"{name}_present", dist.Bernoulli(probability).to_event(event_dim), infer=auxiliary
            )
            value = pyro.sample(
                f"{name}_slab", dist.Normal(loc, scale).to_event(event_dim), infer=auxiliary
            )
        yield name, sample_site(self.site, present * value, plates)


class Mixture(PyroModule):
    """The reduced models of a correlated factor: all of them, or those that a walk visited."""

    def __init__(self, mixture: SubsetMixture) -> None:
        super().__init__()
        factor = mixture.elements.factor
        self.sites = factor.sites
        self.family = type(factor.posterior)
        self.names = tuple(vars(factor.posterior))
        for name, tensor in vars(factor.posterior).items():
            self.register_buffer(name, tensor.detach().clone())
        # Where a joint prior moves what is left, that follows from more than the posterior.
        gaussian = isinstance(mixture.posterior, Dense | LowRank)
        self._moved = None if gaussian else mixture.posterior
        self.mask: Tensor | None
        self.register_buffer("mask", factor.mask)
        # Others are drawn less often than once in a million million draws.
        likely = mixture.weight > _RAREST / len(mixture.weight)
        self.register_buffer("open", mixture.elements.mask)
        self.register_buffer("kept", mixture.kept[likely])
        self.register_buffer("weight", mixture.weight[likely])

    @property
    def posterior(self) -> Any:
        """Of the full model, in float64."""
        if self._moved is not None:
            return self._moved
        return self.family(*(self.get_buffer(name) for name in self.names)).to(torch.float64)

    def forward(self, plates: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Sample a model and then the sites; yield their names and values."""
        name = "+".join(site.name for site in self.sites)
        auxiliary = {"is_auxiliary": True}
        like = self.get_buffer("loc")
        index = pyro.sample(f"{name}_model", dist.Categorical(self.weight), infer=auxiliary)
        noise = pyro.sample(
            f"{name}_noise",
            dist.Normal(like.new_zeros(self.posterior.noise_size), 1.0).to_event(1),
            infer=auxiliary,
        )
        open_ = self.get_buffer("open")
        kept = torch.ones_like(open_).expand(*index.shape, -1).clone()
        kept[..., open_] = self.get_buffer("kept")[index]
        latent = draw_models(self.posterior, kept, noise.double()).to(like.dtype)
        yield from sample_sites(self.sites, latent, self.mask, plates)


_RAREST = 1e-12
