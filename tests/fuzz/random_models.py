"""Random models with guides: what sites, plates, priors, likelihoods and guides are like.

A number makes one, always the same. What it drew is in its description.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from random import Random
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import Tensor

import pyro_bmr as bmr

ROWS = 12
SHAPES = [(), (1,), (2,), (5,), (2, 3), (3, 1), (2, 1, 2, 2), (0,), (2, 0)]


@dataclass(frozen=True)
class SiteKind:
    """A latent site: its prior, and how many of its axes are in plates, the others in its event."""

    name: str
    shape: tuple[int, ...]
    plates: int
    family: str
    scale_of: str = ""
    loc_of: str = ""
    masked: bool = False
    scaled: float = 1.0


# What priors are made of, all of them with the batch shape of ``one``.
FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda one: dist.Normal(0 * one, one),
    "Normal elsewhere": lambda one: dist.Normal(0.7 * one, 2 * one),
    "Laplace": lambda one: dist.Laplace(0 * one, one),
    "StudentT": lambda one: dist.StudentT(3 * one, 0 * one, one),
    "Cauchy": lambda one: dist.Cauchy(0 * one, one),
    "Logistic": lambda one: dist.Logistic(0 * one, one),
    "LogNormal": lambda one: dist.LogNormal(0 * one, one),
    "HalfNormal": dist.HalfNormal,
    "HalfCauchy": dist.HalfCauchy,
    "Gamma": lambda one: dist.Gamma(2 * one, 2 * one),
    "Exponential": dist.Exponential,
    "InverseGamma": lambda one: dist.InverseGamma(3 * one, 2 * one),
    "Beta": lambda one: dist.Beta(2 * one, 2 * one),
    "Uniform": lambda one: dist.Uniform(-3 * one, 3 * one),
    "Gumbel": lambda one: dist.Gumbel(0 * one, one),
}
# Over the last axis of what they are given.
JOINT: dict[str, Callable[[Tensor], Any]] = {
    "MultivariateNormal": lambda one: dist.MultivariateNormal(
        0 * one, torch.eye(one.shape[-1]).to(one) + 0.3
    ),
    "Dirichlet": lambda one: dist.Dirichlet(2 * one),
}
MIXTURE = "MixtureSameFamily"
REAL = ["Normal", "Normal", "Normal", "Normal elsewhere", "Laplace", "StudentT", "Cauchy"]


def mixture(one: Tensor) -> Any:
    parts = dist.Categorical(torch.tensor([0.5, 0.5]).to(one).expand(*one.shape, 2))
    scales = torch.tensor([0.1, 1.0]).to(one).expand(*one.shape, 2)
    return dist.MixtureSameFamily(parts, dist.Normal(torch.zeros_like(scales), scales))


@dataclass
class RandomModel:
    """A model with a guide, trained for some steps, and all that it is called with."""

    number: int
    dtype: torch.dtype
    sites: list[SiteKind]
    likelihood: str
    learnt_noise: bool
    outliers: str
    effects: int
    guide_kind: str
    guide: Any = None
    args: tuple[Tensor, ...] = ()
    features: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        sites = ", ".join(
            f"{s.name}: {s.family}{list(s.shape)} plates={s.plates}"
            f"{s.scale_of and f' scale={s.scale_of}'}{s.loc_of and f' loc={s.loc_of}'}"
            f"{' masked' * s.masked}{f' x{s.scaled}' if s.scaled != 1 else ''}"
            for s in self.sites
        )
        rest = f"noise={self.learnt_noise} outliers={self.outliers!r} effects={self.effects}"
        return f"{self.number} [{self.guide_kind}, {self.dtype}, {self.likelihood}, {rest}] {sites}"

    @cached_property
    def model(self) -> Callable[..., Tensor]:
        """A function, which a copy of a result shares; a method would bring the guide with it."""
        return lambda x, y=None: self._run(x, y)

    def _run(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        one = x.new_ones(())
        values: dict[str, Tensor] = {}
        mean: Any = 0.1 * x[:, 0]
        for site in self.sites:
            value = values[site.name] = self._sample(site, one, values)
            flat = self._flatten(site, value)
            mean = mean + (flat.unsqueeze(-2) * self.features[site.name]).sum(-1)
        noise: Any = 0.5 * one
        if self.learnt_noise:
            noise = pyro.sample("noise", dist.LogNormal(-1 * one, 0.5 * one))
        size = self.effects or None
        with pyro.plate("data", ROWS, subsample_size=size) as rows:
            mean, seen = mean[..., rows], None if y is None else y[rows]
            if self.effects:
                mean = mean + pyro.sample("effect", dist.Normal(0 * one, one))
            if self.outliers:
                infer = {"enumerate": "parallel"}
                fn: Any = dist.Bernoulli(0.2 * one)
                if self.outliers == "Categorical":
                    fn = dist.Categorical(torch.tensor([0.6, 0.3, 0.1]).to(one))
                noise = noise + 2 * pyro.sample("outlier", fn, infer=infer).to(one)
            return self._observe(mean, noise, seen)

    def _sample(self, site: SiteKind, one: Tensor, values: dict[str, Tensor]) -> Tensor:
        event = site.shape[site.plates :]
        with ExitStack() as around:
            for axis in range(site.plates):
                dim = axis - site.plates
                around.enter_context(pyro.plate(f"{site.name} {axis}", site.shape[axis], dim=dim))
            if site.masked:
                around.enter_context(poutine.mask(mask=self._mask(site)))
            if site.scaled != 1:
                around.enter_context(poutine.scale(scale=site.scaled))
            return pyro.sample(site.name, self._prior(site, one.expand(event), values))

    def _prior(self, site: SiteKind, one: Tensor, values: dict[str, Tensor]) -> Any:
        if site.family in JOINT:
            return JOINT[site.family](one).to_event(one.dim() - 1)
        if site.family == MIXTURE:
            return mixture(one).to_event(one.dim())
        if site.scale_of or site.loc_of:
            scale = values[site.scale_of] if site.scale_of else one.new_ones(())
            loc = values[site.loc_of] if site.loc_of else one.new_zeros(())
            expand = (..., *[None] * one.dim())
            loc, scale = loc[expand] * one, scale[expand] * one
            return dist.Normal(loc, scale).to_event(one.dim())
        return FAMILIES[site.family](one).to_event(one.dim())

    def _mask(self, site: SiteKind) -> Tensor:
        shape = site.shape[: site.plates]
        size = torch.Size(shape).numel()
        return (torch.arange(size) % 3 != 1).reshape(shape)

    def _flatten(self, site: SiteKind, value: Tensor) -> Tensor:
        shape = value.shape[: value.dim() - len(site.shape)]
        return value.reshape(*shape, torch.Size(site.shape).numel())

    def _observe(self, mean: Tensor, noise: Tensor, y: Tensor | None) -> Tensor:
        if self.likelihood == "Bernoulli":
            return pyro.sample("y", dist.Bernoulli(logits=mean + 0 * noise), obs=y)
        if self.likelihood == "StudentT":
            return pyro.sample("y", dist.StudentT(4.0, mean, noise), obs=y)
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)

    @property
    def guided(self) -> Any:
        """The model without what is summed out."""
        return poutine.block(self.model, hide=["outlier"]) if self.outliers else self.model

    @property
    def elbo(self) -> Any:
        return TraceEnum_ELBO(max_plate_nesting=2) if self.outliers else Trace_ELBO()

    def train(self, model: Any, guide: Any, steps: int) -> None:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), self.elbo)
        for _ in range(steps):
            svi.step(*self.args)


def plate_of(size: int, x: Tensor, y: Tensor | None = None) -> Any:
    return pyro.plate("data", ROWS, subsample_size=size)


def two_parts(one: RandomModel, second: Callable[..., Any]) -> Any:
    """Give the first site another guide than the rest."""
    guide = AutoGuideList(one.guided)
    first = one.sites[0].name
    guide.append(second(poutine.block(one.guided, expose=[first])))
    guide.append(AutoNormal(poutine.block(one.guided, hide=[first])))
    return guide


def write(one: RandomModel) -> Any:
    """Write a guide of Normals, of which positive sites are the exponentials."""
    trace = poutine.trace(one.model).get_trace(*one.args)
    latent = {
        name: (node["value"].shape, node["fn"].support, node["fn"].event_dim)
        for name, node in trace.iter_stochastic_nodes()
        if name not in ("outlier", "data") and type(node["fn"]).__name__ != "_Subsample"
    }

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        for site in [*one.sites, *([SiteKind("noise", (), 0, "LogNormal")] * one.learnt_noise)]:
            shape, support, event_dim = latent[site.name]
            loc = pyro.param(f"{site.name} loc", 0.1 * x.new_ones(shape))
            scale = pyro.param(
                f"{site.name} scale", 0.2 * x.new_ones(shape), constraint=constraints.positive
            )
            fn: Any = dist.Normal(loc, scale)
            if support is not constraints.real and "real" not in str(support).lower():
                fn = dist.LogNormal(loc, scale)
            with ExitStack() as around:
                for axis in range(site.plates):
                    dim = axis - site.plates
                    around.enter_context(
                        pyro.plate(f"{site.name} {axis}", site.shape[axis], dim=dim)
                    )
                pyro.sample(site.name, fn.to_event(event_dim))

    return guide


GUIDES: dict[str, Callable[[RandomModel], Any]] = {
    "AutoNormal": lambda one: AutoNormal(
        one.guided,
        init_scale=0.2,
        create_plates=partial(plate_of, one.effects) if one.effects else None,
    ),
    "AutoDiagonalNormal": lambda one: AutoDiagonalNormal(one.guided, init_scale=0.2),
    "AutoMultivariateNormal": lambda one: AutoMultivariateNormal(one.guided, init_scale=0.2),
    "AutoLowRankMultivariateNormal": lambda one: AutoLowRankMultivariateNormal(
        one.guided, init_scale=0.2, rank=1
    ),
    "AutoStructured": lambda one: AutoStructured(one.guided),
    "AutoGaussian": lambda one: AutoGaussian(one.guided),
    "AutoNormalMessenger": lambda one: AutoNormalMessenger(one.guided),
    "mean_field": lambda one: bmr.mean_field(one.guided, gamma=[one.sites[0].name]),
    "AutoGuideList with AutoMultivariateNormal": partial(two_parts, second=AutoMultivariateNormal),
    "AutoGuideList with AutoDelta": partial(two_parts, second=AutoDelta),
    "written": write,
}
# Of Pyro's guides, those that take a plate that takes a part of its rows.
TAKES_PARTS = ["AutoNormal"]


def make(number: int) -> RandomModel:
    """Make the model of a number, and train its guide a little."""
    random = Random(f"model {number}")
    one = draw(random, number)
    torch.manual_seed(number)
    x = torch.randn(ROWS, 2).to(one.dtype)
    for site in one.sites:
        size = torch.Size(site.shape).numel()
        one.features[site.name] = 0.7 * torch.randn(ROWS, size).to(one.dtype)
    with torch.no_grad(), poutine.block():
        y = one.model(x)
    if one.effects:
        y = torch.randn(ROWS).to(one.dtype)
    y = y.to(one.dtype).clamp(-10, 10)
    one.args = (x, (y > 0).to(one.dtype) if one.likelihood == "Bernoulli" else y)
    one.guide = GUIDES[one.guide_kind](one)
    one.train(one.model, one.guide, 10)
    return one


def draw(random: Random, number: int) -> RandomModel:
    guide_kind = random.choice([*GUIDES, "AutoNormal", "AutoMultivariateNormal"])
    sites: list[SiteKind] = []
    for i in range(random.randint(1, 4)):
        name, shape = f"s{i}", random.choice(SHAPES)
        plates = random.randint(0, min(2, len(shape))) if 0 not in shape else 0
        kind = random.random()
        family, scale_of, loc_of = random.choice(REAL), "", ""
        scalars = [s.name for s in sites if s.shape == () and s.family in ("LogNormal", "Gamma")]
        places = [s.name for s in sites if s.shape == () and s.family == "Normal"]
        if kind < 0.25:
            family = random.choice([*FAMILIES])
        elif kind < 0.35 and len(shape) > plates and shape[-1] > 1:
            family = random.choice([*JOINT])
        elif kind < 0.4 and guide_kind == "written":
            family = MIXTURE
        elif kind < 0.65 and (scalars or places):
            family = "Normal"
            scale_of = random.choice(scalars) if scalars else ""
            loc_of = random.choice(places) if places and random.random() < 0.6 else ""
        elif kind < 0.75:
            shape, plates = (), 0
            family = random.choice(["LogNormal", "Gamma", "Normal"])
        masked = plates > 0 and random.random() < 0.15
        scaled = 0.5 if random.random() < 0.08 else 1.0
        if i == 0 and guide_kind == "mean_field":
            family, scale_of, loc_of = "Gamma", "", ""
        sites.append(SiteKind(name, shape, plates, family, scale_of, loc_of, masked, scaled))
    effects = 4 if guide_kind in TAKES_PARTS and random.random() < 0.2 else 0
    outliers = ""
    if not effects and random.random() < 0.2:
        outliers = random.choice(["Bernoulli", "Categorical"])
    return RandomModel(
        number=number,
        dtype=random.choice([torch.float32, torch.float32, torch.float64]),
        sites=sites,
        likelihood="Normal"
        if outliers
        else random.choice(["Normal", "Normal", "Bernoulli", "StudentT"]),
        learnt_noise=random.random() < 0.4,
        outliers=outliers,
        effects=effects,
        guide_kind=guide_kind,
    )
