"""Bayesian model reduction in rounds: train, reduce, train what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from problems import Problem
from pruned import Pruned
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from training import train_dense

import pyro_bmr as bmr
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.selections import Selection
from pyro_bmr.training.rates import hold_and_fall

ROWS = 64
# For the time that a prediction takes: draws, and cores.
NUM_DRAWS, NUM_THREADS = 20, 2
# In the first round, in nats.
MARGIN = 0.01


@dataclass(frozen=True)
class Recipe:
    """How a network is trained and pruned. Each that differs from the first is an attempt."""

    # Of what a unit takes in, whose standard deviation is 4 at the start for inputs of size 1.
    prior: Any = bmr.nn.learned_normal(4.0)
    # What shares a scale of the prior that is tuned after each reduction.
    tune: str | None = None
    groups: Any = bmr.elements
    # By how much F may rise for an element that goes, over what the problem's schedule says.
    boldness: float = 1.0
    # From a problem and the number of the round to what goes, in place of the evidence.
    select: Callable[[Problem, int], Selection] | None = None
    # The first half of the first training is that of a dense network, where the guide starts.
    pretrain: bool = True
    # How often each image counts during the first half of what is left of it.
    warm_up: float = 10.0
    lr: float = 2e-3
    # That of the problem, if it is none.
    estimator: str | None = None
    # How many times as long each round is as the problem says.
    patience: float = 1.0
    # How the last round is done, if in another way.
    end: Recipe | None = None

    def choose(self, problem: Problem, number: int) -> Selection:
        """Say what goes in a round; the margin grows by the same factor in each."""
        if self.select is not None:
            return self.select(problem, number)
        schedule = problem.schedule
        done = (number - 1) / max(1, len(schedule.rounds) - 1)
        margin = self.boldness * MARGIN * (schedule.margin / MARGIN) ** done
        return bmr.by_evidence(margin=-margin)


def _by_snr(problem: Problem, number: int) -> Selection:
    """Keep as many as other methods, of the highest (Blundell et al. 2015, sec. 5.1)."""
    whole = sum(value.numel() for value in problem.make(problem.widths).parameters())
    kept = whole / problem.schedule.compress(number)

    def select(scores: Scores) -> Mapping[str, Tensor]:
        left = sum(one.numel() for one in scores.delta_f.values())
        return bmr.baselines.snr(max(0.0, 1 - kept / left))(scores)

    return select


def _by_share(problem: Problem, number: int) -> Selection:
    """Keep a share of the units of each layer, those that the evidence values most; then elements.

    Alone the first would reach the goal of the schedule: between two hidden layers weights go with
    the square of the width.
    """
    part, elements = problem.schedule.compress(1) ** -0.5, OURS.choose(problem, number)

    def select(scores: Scores) -> Mapping[str, Tensor]:
        if not scores.layers:
            return elements(scores)
        return {
            name: one.argsort(descending=True).argsort() < round(part * len(one))
            for name, one in scores.elimination().items()
        }

    return select


OURS = Recipe()
FIXED = replace(OURS, prior=bmr.nn.fan_in_normal(4.0), boldness=0.0, warm_up=1.0)
RECIPES: Mapping[str, Recipe] = {
    "bmr": OURS,
    "bmr, units": replace(OURS, groups=[bmr.units, bmr.elements]),
    "bmr, shares of units": replace(OURS, groups=[bmr.units, bmr.elements], select=_by_share),
    "bmr, no warm-up": replace(OURS, warm_up=1.0),
    "bmr, from scratch": replace(OURS, pretrain=False),
    "bmr, smaller margins": replace(OURS, boldness=0.1),
    "bmr, larger margins": replace(OURS, boldness=10.0),
    "bmr, global draws": replace(OURS, estimator="global"),
    "bmr, faster": replace(OURS, lr=4e-3),
    "bmr, slower": replace(OURS, lr=1e-3),
    "bmr, faster at the end": replace(OURS, end=replace(OURS, lr=4e-3)),
    "bmr, slower at the end": replace(OURS, end=replace(OURS, lr=5e-4)),
    "bmr, longer at the end": replace(OURS, end=replace(OURS, patience=2.0)),
    "bmr, scales by layer at the end": replace(OURS, end=replace(OURS, tune="layer")),
    "bmr, global draws at the end": replace(OURS, end=replace(OURS, estimator="global")),
    "bmr, scales by layer": replace(FIXED, tune="layer"),
    "bmr, fixed prior": FIXED,
    "bmr, fixed narrow prior": replace(FIXED, prior=bmr.nn.fan_in_normal(1.0)),
    "snr": replace(FIXED, select=_by_snr),
}


class Classifier(PyroModule):
    """A network whose weights have a prior; each image counts ``weight`` times."""

    weight = 1.0

    def __init__(self, net: nn.Module, prior: Any) -> None:
        super().__init__()
        self.net = bmr.bayesianize(net, prior=prior)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logits."""
        logits = self.net(x)
        with pyro.plate("images", len(x)), poutine.scale(scale=self.weight):
            pyro.sample("class", dist.Categorical(logits=logits), obs=y)
        return logits


def train(problem: Problem, seed: int, recipe: Recipe, folder: Path) -> Iterator[Pruned]:
    """Train, and prune in rounds; a folder keeps what is trained, so that a killed run goes on.

    Yields
    ------
    Pruned
        After the first training, and after each round.
    """
    schedule, first = problem.schedule, problem.schedule.first
    net, seconds, began = problem.make_network(seed), 0.0, perf_counter()
    if recipe.pretrain:
        net = _pretrain(problem, first // 2, seed, folder / "pretrained.pt")
        first -= first // 2
    model: Any = Classifier(net, recipe.prior)
    start = bmr.init_to_pretrained(model)
    guide: Any = AutoNormal(model, init_loc_fn=start, init_scale=0.02)

    def fit(recipe: Recipe, epochs: int, name: str) -> None:
        bmr.fit(
            *(model, guide, problem.x, problem.y),
            num_epochs=epochs,
            batch_size=schedule.batch_size,
            lr=hold_and_fall(recipe.lr),
            estimator=recipe.estimator or problem.estimator,
            seed=seed,
            checkpoint=folder / name,
        )

    dense, epochs_done = (model, guide), schedule.first - first
    for number, epochs in enumerate((first, *schedule.rounds)):
        if number == len(schedule.rounds) and recipe.end is not None:
            recipe = recipe.end
        if number:
            began, epochs = perf_counter(), round(recipe.patience * epochs)
            model, guide = _reduce(problem, recipe, number, model, guide)
        elif recipe.warm_up > 1:
            model.weight = recipe.warm_up
            fit(recipe, epochs // 2, "warm-up")
            model.weight = 1.0
            epochs_done, epochs = epochs_done + epochs // 2, epochs - epochs // 2
        fit(recipe, epochs, f"round-{number}")
        epochs_done += epochs
        seconds += _remember(folder / f"round-{number}.seconds", perf_counter() - began)
        pairs = {"dense": dense, "pruned": (model, guide)}
        yield _describe(problem, seed, number, pairs, epochs_done, seconds)


def _pretrain(problem: Problem, epochs: int, seed: int, path: Path) -> nn.Sequential:
    """Train a dense network."""
    net = problem.make_network(seed)
    train_dense(problem, net, epochs, torch.Generator("cpu").manual_seed(seed), path)
    return net


def _remember(path: Path, seconds: float) -> float:
    """Keep what the round took when it was trained, not what it takes to read it again."""
    if not path.exists():
        path.write_text(str(seconds))
    return float(path.read_text())


def _reduce(
    problem: Problem, recipe: Recipe, number: int, model: Any, guide: Any
) -> tuple[Any, Any]:
    """Reduce and compact; where the prior is tuned, that of what is left.

    Tuned before anything is pruned, one scale for the few weights of a layer that are needed and
    for the many that are not would be nearly zero.
    """
    result = bmr.reduce(
        guide,
        model=model if number == 1 else None,
        groups=recipe.groups,
        select=recipe.choose(problem, number),
    )
    small = result.compact(problem.x[:ROWS], problem.y[:ROWS])
    if recipe.tune is None:
        return small.model, small.guide
    tuned = bmr.tune_prior(small.guide, shared=recipe.tune)
    return tuned.model, tuned.guide


def _describe(
    problem: Problem,
    seed: int,
    number: int,
    pairs: Mapping[str, Any],
    epochs: int,
    seconds: float,
) -> Pruned:
    model, guide = pairs["pruned"]
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        draws = [_arrange(guide(problem.x[:ROWS], problem.y[:ROWS])) for _ in range(problem.draws)]
    return Pruned(
        level=number,
        weights={name.removeprefix("net."): value for name, value in guide.median().items()},
        predict=lambda images: _predict(model, draws, images),
        epochs=epochs,
        seconds=seconds,
        measure=lambda: _measure(problem, pairs),
    )


def _measure(problem: Problem, pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Measure size, F and the time of a prediction, beside that of the network before pruning."""
    model, guide = pairs["pruned"]
    mean, error = bmr.free_energy(
        *(model, guide, problem.x, problem.y), num_samples=2, batch_size=500
    )
    costs = _measure_costs(pairs, problem.x[:ROWS])
    cost, whole = costs.loc["pruned"], costs.loc["dense"]
    layers = [value for value in guide.median().values() if value.dim() > 1]
    return {
        "weights": int(cost["non-zero"]),
        "compression": float(whole["parameters"] / cost["non-zero"]),
        "widths": "-".join(str(len(value)) for value in layers),
        "flops": int(cost["FLOPs"]) // ROWS,
        "free_energy": mean,
        "free_energy_error": error,
        "predictive_ms": float(cost["predictive (ms)"]),
        "dense_predictive_ms": float(whole["predictive (ms)"]),
    }


def _measure_costs(pairs: Mapping[str, Any], x: Tensor) -> pd.DataFrame:
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        return bmr.measure_costs(pairs, x, num_samples=NUM_DRAWS, seconds=2.0).summary()
    finally:
        torch.set_num_threads(threads)


def _arrange(draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let channels of filters come last in memory, which is three times as fast."""
    form = {True: torch.channels_last, False: torch.contiguous_format}
    return {n: v.contiguous(memory_format=form[v.dim() == 4]) for n, v in draw.items()}


def _predict(model: Any, draws: Sequence[Mapping[str, Tensor]], images: Tensor) -> Tensor:
    """Average the class probabilities of draws of the weights."""
    chances = [poutine.condition(model, draw)(images).softmax(-1) for draw in draws]
    return torch.stack(chances).mean(0)
