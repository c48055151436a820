"""Priors of ``w`` under AutoNormal, for the table of support."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pairs import Pair, observe
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor


def under(prior: Callable[[], Any]) -> Pair:
    """Draw three weights, or a vector of three, from a prior."""

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        fn = prior()
        fn = fn if fn.event_shape else fn.expand([3]).to_event(1)
        return observe(x @ pyro.sample("w", fn), y)

    return Pair(model, AutoNormal(model))


def learnt() -> Any:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    return dist.Normal(0.0, scale)


def ard() -> Any:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
    return dist.Normal(0.0, scale).to_event(1)


def centred() -> Any:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    return dist.Normal(loc, pyro.sample("scale", dist.HalfNormal(1.0)))


def horseshoe() -> Any:
    whole = pyro.sample("whole", dist.HalfCauchy(1.0))
    local = pyro.sample("local", dist.HalfCauchy(torch.ones(3)).to_event(1))
    return dist.Normal(0.0, whole * local).to_event(1)


def correlated() -> Any:
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5)


def mixture() -> Any:
    parts = dist.Categorical(torch.tensor([0.5, 0.5]))
    return dist.MixtureSameFamily(parts, dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0])))


def flat() -> Pair:
    """Start at a value, since there is nothing to draw from."""
    pair = under(lambda: dist.ImproperUniform(constraints.real, (), ()))
    start = init_to_value(values={"w": 0.1 * torch.ones(3)})
    return Pair(pair.model, AutoNormal(pair.model, init_loc_fn=start))


def written_normal(pair: Pair) -> Pair:
    """Pyro's autoguides refuse mixtures."""

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", 0.1 * torch.ones(3))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))

    return Pair(pair.model, guide)


CASES: dict[str, Callable[[], Pair]] = {
    "`Normal`": partial(under, lambda: dist.Normal(0.0, 1.0)),
    "`Laplace`": partial(under, lambda: dist.Laplace(0.0, 1.0)),
    "`StudentT`": partial(under, lambda: dist.StudentT(3.0, 0.0, 1.0)),
    "`Cauchy`": partial(under, lambda: dist.Cauchy(0.0, 1.0)),
    "`MixtureSameFamily` of Normals, with a Normal guide": lambda: written_normal(under(mixture)),
    "`Normal` with a scale that is learnt": partial(under, learnt),
    "`Normal` with a scale of its own for each weight (ARD)": partial(under, ard),
    "`Normal` with a location and a scale (centred hierarchy)": partial(under, centred),
    "horseshoe, by its scales": partial(under, horseshoe),
    "`MultivariateNormal`": partial(under, correlated),
    "`LogNormal`": partial(under, lambda: dist.LogNormal(0.0, 1.0)),
    "`HalfNormal`": partial(under, lambda: dist.HalfNormal(1.0)),
    "`Gamma`": partial(under, lambda: dist.Gamma(2.0, 2.0)),
    "`Beta`": partial(under, lambda: dist.Beta(2.0, 2.0)),
    "`Uniform`": partial(under, lambda: dist.Uniform(-3.0, 3.0)),
    "`Dirichlet`": partial(under, lambda: dist.Dirichlet(torch.ones(3))),
    "`ImproperUniform` (flat)": flat,
    "`Logistic`, or another that is not registered": partial(
        under, lambda: dist.Logistic(0.0, 1.0)
    ),
}
