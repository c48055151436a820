"""Guides of a regression with Normal weights ``w``, for the table of support."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pairs import Pair, X, Y, observe
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from torch import Tensor, nn

import pyro_bmr as bmr


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    return observe(x @ pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1)), y)


def with_other(prior: Any) -> Callable[..., Any]:
    """Return the same with another site, on which the noise depends."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        other = pyro.sample("other", prior, infer={"enumerate": "parallel"})
        return observe(x @ w, y, 0.3 + (other.mean(-1) if prior.event_shape else other))

    return model


def factors(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with pyro.plate("rows", 24):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        return pyro.sample("x", dist.Normal(z @ w, 0.5).to_event(1), obs=x)


def auto(family: Callable[[Any], Any]) -> Pair:
    return Pair(regression, family(regression))


def in_list(family: Callable[[Any], Any], prior: Any) -> Pair:
    """Pair an AutoNormal of ``w`` with another guide of the other site."""
    model = with_other(prior)
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["other"])))
    guide.append(family(poutine.block(model, expose=["other"])))
    return Pair(model, guide)


def laplace() -> Pair:
    guide = AutoLaplaceApproximation(regression)
    return Pair(regression, guide, finish=lambda one: one.laplace_approximation(X, Y))


def gamma() -> Pair:
    model = with_other(dist.Gamma(2.0, 2.0))
    return Pair(model, bmr.mean_field(model, gamma=["other"]))


def write_w() -> None:
    loc = pyro.param("loc", 0.1 * torch.ones(3))
    scale = pyro.param("scale", 0.1 * torch.ones(3), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


def written(x: Tensor, y: Tensor | None = None) -> None:
    write_w()


def written_jointly(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.param("loc", 0.1 * torch.ones(3))
    tril = pyro.param("tril", 0.1 * torch.eye(3), constraint=constraints.lower_cholesky)
    pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=tril))


def another_family() -> Pair:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        write_w()
        width = pyro.param("width", torch.tensor(0.3), constraint=constraints.positive)
        pyro.sample("other", dist.HalfNormal(width))

    return Pair(with_other(dist.HalfNormal(1.0)), guide)


def tempered(x: Tensor, y: Tensor | None = None) -> None:
    with poutine.scale(scale=0.5):
        write_w()


def amortised() -> Pair:
    encoder = nn.Linear(3, 2)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("encoder", encoder)
        loc = pyro.param("loc", 0.1 * torch.ones(2, 3))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(2))
        with pyro.plate("rows", 24):
            pyro.sample("z", dist.Normal(encoder(x), 0.1).to_event(1))

    return Pair(factors, guide)


def calling() -> Pair:
    inner = AutoNormal(regression)
    return Pair(regression, lambda x, y=None: inner(x, y))


class Easy(EasyGuide):
    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        group = self.group(match="w")
        loc = pyro.param("loc", 0.1 * torch.ones(3))
        group.sample("group", dist.Normal(loc, 0.1).to_event(1))


def reduced() -> Pair:
    guide = AutoNormal(regression)
    guide(X, Y)
    result = bmr.reduce(guide, select=bmr.top_k(2))
    return Pair(result.model, result.guide)


def bound() -> Pair:
    pair = auto(AutoNormal)
    return Pair(partial(pair.model, X), partial(pair.guide, X), (Y,))


def around(handler: Callable[..., Any], **options: Any) -> Pair:
    pair = auto(AutoNormal)
    return Pair(pair.model, handler(pair.guide, **options))


def mcmc() -> Pair:
    chain = MCMC(NUTS(regression), 40, warmup_steps=20, disable_progbar=True)
    chain.run(X, Y)
    return Pair(regression, chain)


TWO = dist.LogNormal(0.0, 1.0).expand([2]).to_event(1)
CASES: dict[str, Callable[[], Pair]] = {
    "`AutoNormal`": partial(auto, AutoNormal),
    "`AutoDiagonalNormal`": partial(auto, AutoDiagonalNormal),
    "`AutoMultivariateNormal`": partial(auto, AutoMultivariateNormal),
    "`AutoLowRankMultivariateNormal`": partial(auto, AutoLowRankMultivariateNormal),
    "`AutoLaplaceApproximation`, by `.laplace_approximation(x, y)`": laplace,
    "`bmr.mean_field` with an `AutoGamma`": gamma,
    "`AutoStructured`": partial(auto, AutoStructured),
    "`AutoGaussian`": partial(auto, AutoGaussian),
    "`AutoNormalMessenger`": partial(auto, AutoNormalMessenger),
    "`AutoHierarchicalNormalMessenger`": partial(auto, AutoHierarchicalNormalMessenger),
    "`AutoRegressiveMessenger`": partial(auto, AutoRegressiveMessenger),
    "`AutoGuideList` with an `AutoDelta`": partial(in_list, AutoDelta, dist.LogNormal(0.0, 1.0)),
    "`AutoGuideList` with an `AutoIAFNormal`": partial(
        in_list,
        partial(AutoIAFNormal, hidden_dim=[4]),
        TWO,
    ),
    "`AutoGuideList` with an `AutoDiscreteParallel`": partial(
        in_list, AutoDiscreteParallel, dist.Bernoulli(0.5)
    ),
    "a function with `Normal`": partial(Pair, regression, written),
    "a function with `MultivariateNormal`": partial(Pair, regression, written_jointly),
    "a function with another family beside the weights": another_family,
    "a function with an encoder of rows (amortised)": amortised,
    "a function with `poutine.scale` inside (tempered)": partial(Pair, regression, tempered),
    "a function that calls an `AutoNormal`": calling,
    "`EasyGuide`": lambda: Pair(regression, Easy(regression)),
    "`result.guide`": reduced,
    "`AutoNormal` in `functools.partial`": bound,
    "`AutoNormal` in `poutine.block`": partial(around, poutine.block, hide=["y"]),
    "`AutoNormal` in `poutine.scale`": partial(around, poutine.scale, scale=0.5),
    "`AutoDelta` alone": partial(auto, AutoDelta),
    "`AutoIAFNormal` alone": partial(auto, partial(AutoIAFNormal, hidden_dim=[4])),
    "a finished `MCMC`": mcmc,
    "a dictionary of draws": lambda: Pair(regression, mcmc().guide.get_samples()),
}
