"""Random small problems, and whether a reduction that was given the data raises F."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import autoguide

import pyro_bmr as bmr
from pyro_bmr.estimators.measurement import common_draws, mean_and_error

ROWS, NOISE = 30, 0.3
# Sizes of the layers, and what stands between them.
MODELS = {
    "linear": ((8, 1), torch.tanh),
    "tanh": ((3, 6, 1), torch.tanh),
    "relu": ((4, 5, 5, 1), torch.relu),
}
GUIDES = {
    "normal": autoguide.AutoNormal,
    "diagonal": autoguide.AutoDiagonalNormal,
    "multivariate": autoguide.AutoMultivariateNormal,
    "low rank": partial(autoguide.AutoLowRankMultivariateNormal, rank=2),
}
STEPS = (0, 10, 100, 1000)


@dataclass(frozen=True)
class Case:
    """A model, its guide after some steps of training, and the data."""

    model_name: str
    guide_name: str
    steps: int
    model: Callable[..., Any]
    guide: Any
    args: tuple[torch.Tensor, torch.Tensor]


def make_case(number: int) -> Case:
    """Twelve in a row have every model with every guide; the rest is drawn."""
    pyro.clear_param_store()
    pyro.set_rng_seed(number)
    chance = random.Random(number)
    model_name, guide_name = list(MODELS)[number % 3], list(GUIDES)[number % 4]
    steps, init_scale = chance.choice(STEPS), 0.05 ** chance.random()
    sizes, activation = MODELS[model_name]
    model = partial(_network, sizes, activation, chance.choice([0.5, 1.0, 2.0]))
    x = torch.randn(ROWS, sizes[0])
    y = x[:, 0] + (2 * x[:, 1]).tanh() + NOISE * torch.randn(ROWS)
    guide = GUIDES[guide_name](model, init_scale=init_scale)
    guide(x, y)
    if steps:
        lr = chance.choice([0.003, 0.01, 0.03])
        bmr.fit(model, guide, x, y, num_epochs=steps, lr=lr, compile=False, progress=False)
    return Case(model_name, guide_name, steps, model, guide, (x, y))


def reduce(case: Case, seed: int = 0) -> bmr.Reduction:
    select = bmr.by_free_energy(seed=seed, progress=False)
    return bmr.reduce(case.guide, *case.args, select=select)


def measure(case: Case, result: bmr.Reduction, num_samples: int = 100) -> tuple[float, float]:
    """ΔF at random numbers that the selection has not seen, and its error."""
    before, after = (
        torch.sub(
            *common_draws(
                *decision.assemble()[:2],
                *(case.args, {}, num_samples),
                seed=2026,
                couplings=decision.couplings(),
            )
        )
        for decision in (result.decision.restrict(()), result.decision)
    )
    return mean_and_error(after - before)


def rose(delta_f: float, error: float) -> bool:
    return delta_f > 3 * error


def _network(
    sizes: tuple[int, ...],
    activation: Callable[[torch.Tensor], torch.Tensor],
    prior: float,
    x: torch.Tensor,
    y: torch.Tensor,
) -> None:
    h = x
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        weight = dist.Normal(torch.zeros(inputs, outputs), prior).to_event(2)
        bias = dist.Normal(torch.zeros(outputs), prior).to_event(1)
        h = (activation(h) if i else h) @ pyro.sample(f"w{i}", weight) + pyro.sample(f"b{i}", bias)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(h.squeeze(-1), NOISE), obs=y)
