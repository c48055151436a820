"""What a round of pruning costs beside its training: two networks on MNIST.

Run with ``python benchmarks/rounds.py``; writes ``benchmarks/rounds.csv`` and fails if a step takes
more than a tenth of what the training of a round takes, 10 epochs in batches of 128 by `fit`.

The networks are LeNet-300-100 and LeNet-5 in the size of Caffe. Each is trained for a short while,
reduced by units and then by elements with all 60,000 images, and measured as `prune` does it. All
times are seconds of the processor, of one thread, since others may use the machine. Of the training
400 compiled steps are timed, after 800, and scaled to 10 epochs of 469, without what compiling
takes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.datasets import load_mnist
from pyro_bmr.programs.fingerprints import fingerprint_run
from pyro_bmr.selection.scores import Scores
from pyro_bmr.training.states import Program

RESULTS = Path(__file__).with_suffix(".csv")
EPOCHS, BATCH, TIMED_STEPS = 10, 128, 400
MOST = 0.1
GROUPS = [bmr.units, bmr.elements]


class Digits(PyroModule):
    """A network under a Normal prior of scale 4 / sqrt(fan-in)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = bmr.bayesianize(net, prior=bmr.nn.fan_in_normal(4.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logits."""
        logits = self.net(x)
        with pyro.plate("images", len(x)):
            pyro.sample("digit", dist.Categorical(logits=logits), obs=y)
        return logits


@dataclass(frozen=True)
class Network:
    """How to make a network, the shape of its images, and how many it is first trained on."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    images: int
    epochs: int


def lenet_300_100() -> nn.Module:
    """784-300-100-10."""
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(*layers)


def lenet_5() -> nn.Module:
    """Two convolutions and two linear layers, as in Caffe."""
    convolutions = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)
    linear = nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)
    return nn.Sequential(*convolutions, nn.Flatten(), *linear)


NETWORKS = {
    "LeNet-300-100": Network(lenet_300_100, (784,), 60_000, 5),
    "LeNet-5": Network(lenet_5, (1, 28, 28), 20_000, 1),
}


def main() -> int:
    """Time, print and write; return 1 if a step takes more than a tenth of the training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", default=os.environ.get("PYRO_BMR_DATA"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    data = load_mnist(options.data_dir)
    rows = [
        {"network": name, "step": step, "seconds": seconds}
        for name in options.networks
        for step, seconds in time_round(NETWORKS[name], data.x, data.y)
    ]
    table = pd.DataFrame(rows).set_index(["network", "step"])
    training = table.xs("training", level="step")["seconds"]
    table["of training"] = table["seconds"] / training.reindex(table.index, level="network")
    if RESULTS.exists():
        before = pd.read_csv(RESULTS, index_col=["network", "step"])
        table = pd.concat([before.drop(options.networks, errors="ignore"), table])
    table.round(4).to_csv(RESULTS)
    print(table.round(4).to_string())
    beside = table.drop("training", level="step")["of training"]
    return int((beside > MOST).any())


def time_round(network: Network, images: Tensor, y: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the steps of a round, and the seconds that each takes."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_num_threads(1)
    x = images.reshape(-1, *network.shape)
    model = Digits(network.make())
    guide = AutoNormal(model, init_loc_fn=bmr.init_to_pretrained(model), init_scale=0.02)
    train(model, guide, x[: network.images], y[: network.images], network.epochs)
    # What torch imports when it first captures a program is no part of a round.
    bmr.reduce(guide, groups=GROUPS)

    yield "reduce, without data", timed(lambda: bmr.reduce(guide, groups=GROUPS))[1]
    searched: list[float] = []
    search = bmr.by_free_energy(progress=False)

    def select(scores: Scores) -> Any:
        masks, seconds = timed(lambda: search(scores))
        searched.append(seconds)
        return masks

    result, seconds = timed(lambda: bmr.reduce(guide, x, y, groups=GROUPS, select=select))
    yield "reduce: search, units", searched[0]
    yield "reduce: search, elements", searched[1]
    yield "reduce: all else", seconds - sum(searched)
    told = {"lr": lambda _: 1e-3, "num_epochs": EPOCHS, "groups": GROUPS}
    yield "prune: fingerprint", timed(lambda: fingerprint_run(guide, (x, y), told))[1]
    program = Program(model, (x, y), {}, num_samples=100)
    whole = bmr.reduce(guide, groups=GROUPS, select=lambda scores: dict(scores.kept))
    start = program.start(whole, guide)
    change, seconds = timed(lambda: program.measure_change(start, result))
    yield "prune: F before training", seconds
    after, seconds = timed(lambda: program.go_on(start, result, change))
    yield "prune: F after training", seconds
    yield "prune: which is lower", timed(lambda: program.settle(start, after))[1]
    yield "compact", timed(lambda: result.compact(x[:64], y[:64]))[1]
    yield "training", time_training(result, x, y)


def train(model: Any, guide: Any, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train at one learning rate, and then at one that falls."""

    def lr(done: float) -> float:
        return 3e-3 * min(1.0, 2.02 - 2 * done)

    options: dict[str, Any] = {"batch_size": BATCH, "lr": lr, "estimator": "local"}
    bmr.fit(model, guide, x, y, num_epochs=epochs, **options, seed=0, progress=False)


def time_training(result: bmr.Reduction, x: Tensor, y: Tensor) -> float:
    """Time some steps of the training of a reduction, and scale them to 10 epochs."""
    ends: list[float] = []
    rows = BATCH * TIMED_STEPS
    bmr.fit(
        *(result.model, result.guide, x[:rows], y[:rows]),
        num_epochs=3,  # Of fewer than 1,000 steps in all, `fit` compiles none.
        batch_size=BATCH,
        lr=1e-3,
        estimator="local",
        progress=False,
        callback=lambda _: ends.append(time.process_time()),
    )
    return (ends[2] - ends[1]) / TIMED_STEPS * EPOCHS * -(-len(x) // BATCH)


T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return what a function does, and the seconds of the processor that it takes."""
    start = time.process_time()
    return run(), time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
