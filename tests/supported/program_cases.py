"""Models with weights ``w`` under AutoNormal, for the table of support."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pairs import Pair, X, Y, observe
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyro_bmr as bmr

OBSERVED = torch.arange(24) % 4 > 0


def weights() -> Tensor:
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def plates(x: Tensor, y: Tensor | None = None) -> Tensor:
    with pyro.plate("inputs", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    return observe((x * w.unsqueeze(-2)).sum(-1), y)


def sub_sampling(x: Tensor, y: Tensor | None = None) -> Tensor:
    mean = x @ weights()
    with pyro.plate("data", 24, subsample_size=6) as rows:
        return pyro.sample("y", dist.Normal(mean[rows], 0.5), obs=None if y is None else y[rows])


def sub_sampled_effects(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = weights()
    with pyro.plate("data", 24, subsample_size=6) as rows:
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        mean = (x * w.unsqueeze(-2)).sum(-1)[..., rows] + effect
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y[rows])


def effects(x: Tensor, y: Tensor | None = None) -> Tensor:
    with pyro.plate("groups", 8):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    return observe(w[..., torch.arange(24) % 8], y)


def one_by_one(x: Tensor, y: Tensor | None = None) -> None:
    mean = x @ weights()
    for i in range(4):
        pyro.sample(f"y{i}", dist.Normal(mean[i], 0.5), obs=None if y is None else y[i])


def outcome(family: Callable[[Tensor], Any], values: Tensor) -> Pair:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = torch.sigmoid(x @ weights())
        with pyro.plate("data", 24):
            return pyro.sample("y", family(mean), obs=y)

    return Pair(model, AutoNormal(model), (X, values))


def scaled(x: Tensor, y: Tensor | None = None) -> Tensor:
    mean = x @ weights()
    with poutine.scale(scale=2.0):
        return observe(mean, y)


def masked(x: Tensor, y: Tensor | None = None) -> Tensor:
    mean = x @ weights()
    with poutine.mask(mask=OBSERVED):
        return observe(mean, y)


def partly_observed(x: Tensor, y: Tensor | None = None) -> Tensor:
    mean = x @ weights()
    with pyro.plate("data", 24):
        mask = None if y is None else OBSERVED
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y, obs_mask=mask)


def unnormalised(x: Tensor, y: Tensor | None = None) -> None:
    pyro.factor("y", dist.Normal(x @ weights(), 0.5).log_prob(Y).sum())


def learnt_noise(x: Tensor, y: Tensor | None = None) -> Tensor:
    noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    return observe(pyro.deterministic("mean", x @ weights()), y, noise)


def flat_intercept(x: Tensor, y: Tensor | None = None) -> Tensor:
    intercept = pyro.sample("intercept", dist.ImproperUniform(constraints.real, (), ()))
    return observe(x @ weights() + intercept, y)


def with_flat_intercept() -> Pair:
    """Start at values, since there is nothing to draw from."""
    start = init_to_value(values={"w": 0.1 * torch.ones(3), "intercept": torch.tensor(0.0)})
    return Pair(flat_intercept, AutoNormal(flat_intercept, init_loc_fn=start))


def others_beside(x: Tensor, y: Tensor | None = None) -> Tensor:
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    tril = pyro.sample("tril", dist.LKJCholesky(3, 1.0))
    return observe((x * shares) @ tril @ weights(), y)


def outliers(x: Tensor, y: Tensor | None = None) -> Tensor:
    mean = x @ weights()
    with pyro.plate("data", 24):
        k = pyro.sample("k", dist.Bernoulli(0.1), infer={"enumerate": "parallel"})
        return pyro.sample("y", dist.Normal(mean, 0.5 + 4 * k), obs=y)


def chain(x: Tensor, y: Tensor | None = None) -> None:
    mean, state, shifts = x @ weights(), torch.tensor(0), torch.tensor([0.0, 1.0])
    chances = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for t in pyro.markov(range(4)):
        fn, infer = dist.Categorical(chances[state]), {"enumerate": "parallel"}
        state = pyro.sample(f"k{t}", fn, infer=infer)
        fn = dist.Normal(mean[t] + shifts[state], 0.5)
        pyro.sample(f"y{t}", fn, obs=None if y is None else y[t])


def hierarchy(x: Tensor, y: Tensor | None = None) -> Tensor:
    spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), spread).to_event(1))
    return observe(x @ w, y)


def transformed(x: Tensor, y: Tensor | None = None) -> Tensor:
    affine = dist.transforms.AffineTransform(0.0, 2.0)
    fn = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [affine]).to_event(1)
    return observe(x @ pyro.sample("w", fn), y)


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.w = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return observe(x @ self.w, y)


def of_sub_samples() -> Pair:
    def plates(x: Tensor, y: Tensor | None = None) -> Any:
        return pyro.plate("data", 24, subsample_size=6)

    guide = AutoNormal(sub_sampled_effects, create_plates=plates)
    return Pair(sub_sampled_effects, guide, create_plates=plates)


def network() -> Pair:
    net = bmr.bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        return observe(net(x).squeeze(-1), y)

    return Pair(model, AutoNormal(model))


def reparameterised(model: Callable[..., Any], how: Any) -> Pair:
    return with_auto(poutine.reparam(model, {"w": how}))


def conditioned() -> Pair:
    model = poutine.condition(regression, {"y": Y})
    return Pair(model, AutoNormal(model), (X,))


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    return observe(x @ weights(), y)


def by_keyword() -> Pair:
    return Pair(regression, AutoNormal(regression), (X,), {"y": Y})


def with_auto(model: Callable[..., Any], hide: tuple[str, ...] = ()) -> Pair:
    return Pair(model, AutoNormal(poutine.block(model, hide=hide) if hide else model))


CASES: dict[str, Callable[[], Pair]] = {
    "`pyro.plate` around weights": partial(with_auto, plates),
    "latent variables of groups": partial(with_auto, effects),
    "a plate that sub-samples rows": partial(with_auto, sub_sampling),
    "a plate that sub-samples rows, with latent variables in it": of_sub_samples,
    "`PyroModule` with `PyroSample`": lambda: with_auto(Regression()),
    "`bmr.bayesianize` of a `nn.Module`": network,
    "`Bernoulli` outcomes": partial(
        outcome, lambda mean: dist.Bernoulli(logits=mean), Y.sign().relu()
    ),
    "`Poisson` outcomes": partial(outcome, lambda mean: dist.Poisson(mean.exp()), Y.abs().round()),
    "observations one by one, in a loop": partial(with_auto, one_by_one),
    "data by keyword": by_keyword,
    "`pyro.deterministic`, and `pyro.param` in the model": partial(with_auto, learnt_noise),
    "`poutine.condition`": conditioned,
    "`poutine.scale` around the observations": partial(with_auto, scaled),
    "`poutine.mask` around the observations": partial(with_auto, masked),
    "`obs_mask=`": partial(with_auto, partly_observed),
    "`pyro.factor` for the likelihood": partial(with_auto, unnormalised),
    "a discrete site of each row, enumerated": partial(with_auto, outliers, ("k",)),
    "a hidden Markov chain, enumerated": partial(
        with_auto, chain, tuple(f"k{t}" for t in range(4))
    ),
    "`LocScaleReparam(0.0)`": partial(reparameterised, hierarchy, LocScaleReparam(0.0)),
    "`LocScaleReparam(0.5)`": partial(reparameterised, hierarchy, LocScaleReparam(0.5)),
    "`TransformReparam`": partial(reparameterised, transformed, TransformReparam()),
    "`Dirichlet` and `LKJCholesky` beside the weights": partial(with_auto, others_beside),
    "a flat prior beside the weights": with_flat_intercept,
}
