"""The demo: a Bayesian network of real data, reduced; what was found, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroSample
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pyro_bmr import datasets
from pyro_bmr.estimators.measurement import free_energy
from pyro_bmr.plots.networks import plot_network
from pyro_bmr.plots.theme import load_pyplot
from pyro_bmr.reduction import reduce
from pyro_bmr.results import Reduction
from pyro_bmr.training.fitting import fit

_WIDTH = 80  # columns
_DRAWS = 100


def run(data: datasets.RegressionData, *, epochs: int, seed: int, figure: Path) -> None:
    """Train a network, reduce it, refit it, and tell what each step did."""
    load_pyplot()  # what the last step needs is missed by the first
    console = Console(width=_WIDTH)
    pyro.set_rng_seed(seed)
    order = torch.randperm(len(data.x), device="cpu")
    test, training = order[: len(order) // 5], order[len(order) // 5 :]
    inputs = Standardization.of(data.x[training])
    target = Standardization.of(data.y[training])
    x, y = inputs.apply(data.x), target.apply(data.y).squeeze(-1)
    rows = (x[training], y[training])

    console.print(
        f"[bold]{data.name}[/bold]: {len(training)} rows to train on, {len(test)} to test on, "
        f"{len(data.inputs)} inputs\n"
        f"a {len(data.inputs)}-50-1 ReLU network; every weight has a Normal prior and posterior"
    )
    network = Regression(len(data.inputs))
    guide = AutoNormal(network, init_loc_fn=init_to_sample, init_scale=0.05)
    fit(network, guide, *rows, num_epochs=epochs, batch_size=64, lr=2e-2)
    result = reduce(guide, *rows)

    def score(label: str, model: Any, guide: Any) -> StageScores:
        energy, error = free_energy(model, guide, *rows, num_samples=_DRAWS)
        scores = predictive_scores(model, guide, x[test], y[test], float(target.scale))
        return StageScores(label, MeanScore(energy, error), *scores)

    stages = [
        score("trained", network, guide),
        score("reduced", result.model, result.guide),
    ]
    picture = plot_network(result, labels=data.inputs)[0].figure
    refitted = max(1, epochs // 5)
    fit(result.model, result.guide, *rows, num_epochs=refitted, batch_size=64, lr=1e-2)
    stages.append(score("refitted", result.model, result.guide))
    figure.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(figure, dpi=110)

    console.print("\n[bold]What was found[/bold]")
    console.print(_found(result, data.inputs))
    console.print(result)
    console.print("\n[bold]What was predicted, and what came true[/bold]")
    console.print(_came_true(result, stages))
    console.print(_scores(stages, refitted))
    console.print("\n[bold]What to do next[/bold]")
    console.print(_next(figure))


class Regression(PyroModule):
    """A D-H-1 ReLU network with unit Gaussian priors and a Gamma(1, 1) noise precision."""

    def __init__(self, inputs: int, hidden: int = 50) -> None:
        super().__init__()
        self.fc1 = PyroModule[nn.Linear](inputs, hidden)
        self.fc2 = PyroModule[nn.Linear](hidden, 1)
        for layer in (self.fc1, self.fc2):
            for name, value in list(layer.named_parameters()):
                prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                setattr(layer, name, PyroSample(prior))
        self.precision = PyroSample(dist.Gamma(1.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean of the targets, ``(rows,)``, and observe them where there are any."""
        mean = self.fc2(self.fc1(x).relu()).squeeze(-1)
        scale = self.precision.rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)
        return pyro.deterministic("mean", mean)


@dataclass(frozen=True)
class Standardization:
    """Location and scale of each column of data."""

    loc: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Standardization:
        """Read them from data of shape ``(rows, columns)``; a constant column has scale 1."""
        scale = values.std(0, correction=0)
        return cls(values.mean(0), torch.where(scale > 0, scale, 1))

    def apply(self, values: Tensor) -> Tensor:
        """Standardise."""
        return (values - self.loc) / self.scale


@dataclass(frozen=True)
class MeanScore:
    """A mean over test rows and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def predictive_scores(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    unit: float,
    draws: int = _DRAWS,
) -> tuple[MeanScore, MeanScore]:
    """Return RMSE and log likelihood per row in original units, where a target of 1 is ``unit``."""
    sites = ("mean", "precision")
    samples = Predictive(model, guide=guide, num_samples=draws, return_sites=sites)(x)
    mean, precision = samples["mean"], samples["precision"].reshape(-1, 1)
    square = (unit * (mean.mean(0) - y)).square()
    rmse = float(square.mean().sqrt())
    each = dist.Normal(mean, precision.rsqrt()).log_prob(y).logsumexp(0)
    log_likelihood = each - math.log(draws) - math.log(unit)
    rows = len(y) ** 0.5
    return (
        MeanScore(rmse, float(square.std() / rows / (2 * rmse))),
        MeanScore(float(log_likelihood.mean()), float(log_likelihood.std() / rows)),
    )


@dataclass(frozen=True)
class StageScores:
    """Of the network at one stage: free energy in nats, and two scores of unseen rows."""

    stage: str
    free_energy: MeanScore
    rmse: MeanScore
    log_likelihood: MeanScore


def _found(result: Reduction, inputs: tuple[str, ...]) -> str:
    """Say what is left of the network."""
    read = result.masks["fc1.weight"].any(0).tolist()
    names = [name for name, alive in zip(inputs, read, strict=True) if alive]
    units = int(result.masks["fc2.weight"].any(0).sum())
    weights = [mask for name, mask in result.masks.items() if name != "precision"]
    kept, total = (sum(int(f(mask)) for mask in weights) for f in (torch.sum, torch.numel))
    return (
        f"{kept} of {total} weights do all the work, in {units} of 50 hidden units; they read "
        f"{len(names)} of {len(inputs)} inputs: {', '.join(names) or 'none'}."
    )


def _came_true(result: Reduction, stages: list[StageScores]) -> str:
    """Say the prediction beside a measurement with draws of its own."""
    before, after = (stage.free_energy for stage in stages[:2])
    change, error = after.mean - before.mean, math.hypot(before.error, after.error)
    outcome = "the smaller network is better" if change < -error else "nothing was gained"
    return (
        f"From the posterior alone, the closed form predicted a change of the free energy by "
        f"{result.delta_f:+.1f} nats. Measured on the data it was {change:+.1f} ± {error:.1f}: "
        f"{outcome}."
    )


def _scores(stages: list[StageScores], epochs: int) -> Table:
    """Draw the stages beside each other."""
    table = Table(
        "",
        caption=f"mean ± standard error; refitted: {epochs} more epochs, what was pruned stays 0",
        caption_justify="left",
    )
    for column in ("free energy (nats)", "test RMSE", "test log likelihood"):
        table.add_column(column, justify="right")
    for stage in stages:
        energy = f"{stage.free_energy.mean:.1f} ± {stage.free_energy.error:.1f}"
        table.add_row(stage.stage, energy, str(stage.rmse), str(stage.log_likelihood))
    return table


def _next(figure: Path) -> str:
    return (
        f"The network before and after is in {figure}. With a Pyro model of your own:\n\n"
        "  guide = AutoNormal(model)\n"
        "  bmr.fit(model, guide, x, y, num_epochs=200)\n"
        "  result = bmr.reduce(guide, x, y)  # or bmr.prune(model, guide, x, y, ...)\n"
        "  print(result.audit(x, y))  # how far to trust it"
    )
