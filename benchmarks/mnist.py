"""Smaller networks for real: a 784-300-100-10 network on MNIST, whole and reduced in three ways.

Run with ``python benchmarks/mnist.py``; writes ``benchmarks/mnist.csv`` and fails if a bound is
missed: the network reduced by units and compacted predicts at least 5 times as fast as the whole
one, and loses at most half a point of accuracy.

One network is trained by `fit`. It is reduced by elements, by units, and by units and then
elements; each is compacted, and the last is trained on. Nothing is chosen on the test images.

A prediction is the mean class probability of 20 posterior draws, made by one batched forward of a
plain torch module. Its time is that of 64 images; all networks are timed in turn, in every round,
in an order that rotates, and a ratio is that of one round. Accuracy, negative log likelihood (NLL)
and expected calibration error (ECE, 15 bins of equal width) are of the 10,000 test images. F is the
free energy of the 60,000 training images, in nats, by `free_energy`.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.datasets import load_mnist

NUM_DRAWS, BATCH, BINS = 20, 64, 15
FASTER, POINTS = 5.0, 0.5


class Digits(PyroModule):
    """A 784-300-100-10 ReLU network with normal priors, of which the scale is 4 / sqrt(fan-in)."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        self.net = bmr.bayesianize(nn.Sequential(*layers), prior=bmr.fan_in_normal(4.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logits."""
        logits = self.net(x)
        with pyro.plate("images", len(x)):
            pyro.sample("digit", dist.Categorical(logits=logits), obs=y)
        return logits


@dataclass(frozen=True)
class Network:
    """A network to compare: what it predicts with, and how it came about."""

    name: str
    model: Any
    guide: Any
    compact: bool = False


def main() -> int:
    """Train, reduce, compact, measure, print and write.

    Returns
    -------
    int
        1 if a bound is missed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", default=os.environ.get("PYRO_BMR_DATA"))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=30, help="of timing")
    options = parser.parse_args()
    data = load_mnist(options.data_dir)
    x, y = data.x.flatten(1), data.y
    x_test, y_test = data.x_test.flatten(1), data.y_test
    networks = list(make_networks(x, y, options.epochs))
    modules = {
        network.name: bmr.to_module(
            network.model, network.guide, (x_test[:BATCH],), num_draws=NUM_DRAWS
        )
        for network in networks
    }
    times = measure_times(modules, x_test[:BATCH], options.rounds)
    rows = [
        describe(network, x, y)
        | {"milliseconds": times[network.name].median(), "faster": ...}
        | judge(modules[network.name], x_test, y_test)
        for network in networks
    ]
