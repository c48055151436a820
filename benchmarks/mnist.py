"""Smaller networks for real: a 784-300-100-10 network on MNIST, whole and reduced in four ways.

Run with ``python benchmarks/mnist.py``; writes ``benchmarks/mnist.csv`` and fails if a bound is
missed: the network that is reduced by units and compacted predicts at least 5 times as fast as the
whole one, and loses at most half a point of accuracy.

One network is trained by `fit`. It is reduced by elements, by units, and by units and then
elements; what is reduced is compacted, and the last is trained on for a fifth of the epochs.
Everything is as it comes, no setting of a reduction is chosen, least of all on the test images.

A prediction is the mean class probability of 20 posterior draws, by one batched forward of a plain
torch module (`to_module`). Its time is that of 64 images; all networks take turns
(`measure_costs`). Accuracy, negative log likelihood (NLL) and expected calibration error (ECE, 15
bins of equal width) are of the 10,000 test images. F is the free energy of the 60,000 training
images in nats, by `free_energy`; ΔF is what the reduction had predicted.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr.datasets import load_mnist
from pyro_bmr.diagnostics.calibration import calibration_error

RESULTS = Path(__file__).with_suffix(".csv")
PAGE = Path(__file__).parents[1] / "docs" / "guide" / "units.md"
NUM_DRAWS, BATCH = 20, 64
FASTER, POINTS = 5.0, 0.5


class Digits(PyroModule):
    """A ReLU network of two hidden layers under a Normal prior of scale 4 / sqrt(fan-in)."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        self.net = bmr.bayesianize(nn.Sequential(*layers), prior=bmr.nn.fan_in_normal(4.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the logits."""
        logits = self.net(x)
        with pyro.plate("images", len(x)):
            pyro.sample("digit", dist.Categorical(logits=logits), obs=y)
        return logits


@dataclass(frozen=True)
class Network:
    """A network to compare, with the ΔF that was predicted for it if it is reduced."""

    name: str
    model: Callable[..., Any]
    guide: Any
    delta_f: float = 0.0


def main() -> int:
    """Train, reduce, compact, measure, print and write; return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", default=os.environ.get("PYRO_BMR_DATA"))
    parser.add_argument("--epochs", type=int, default=80)
    options = parser.parse_args()
    data = load_mnist(options.data_dir)
    train, test = (data.x.flatten(1), data.y), (data.x_test.flatten(1), data.y_test)
    networks = list(make_networks(*train, epochs=options.epochs))
    costs = bmr.measure_costs(
        {network.name: (network.model, network.guide) for network in networks},
        test[0][:BATCH],
        num_samples=NUM_DRAWS,
        seconds=20.0,
    )
    rows = [describe(network, *train) | judge(network, *test) for network in networks]
    table = costs.summary().join(pd.DataFrame(rows, index=[network.name for network in networks]))
    table.round(5).to_csv(RESULTS)
    table = pd.read_csv(RESULTS, index_col="network")
    PAGE.write_text(fill(PAGE.read_text(), table))
    print(costs, table.to_string(), sep="\n\n")
    whole, units = table.loc["whole"], table.loc["units, compacted"]
    faster = whole["predictive (ms)"] / units["predictive (ms)"]
    lost = 100 * (whole["accuracy"] - units["accuracy"])
    print(f"units: {faster:.1f} times as fast (wanted {FASTER}), {lost:+.2f} points lost")
    return int(faster < FASTER or lost > POINTS)


def make_networks(x: Tensor, y: Tensor, epochs: int) -> Iterator[Network]:
    """Train a network, and reduce it in several ways."""
    pyro.set_rng_seed(0)
    model = Digits()
    guide = AutoNormal(model, init_loc_fn=bmr.init_to_pretrained(model), init_scale=0.02)
    fit(model, guide, x, y, epochs)
    yield Network("whole", model, guide)
    elements = bmr.reduce(guide)
    yield Network("elements", elements.model, elements.guide, elements.delta_f)
    for name, groups in {
        "elements, compacted": bmr.elements,
        "units, compacted": bmr.units,
        "units and elements, compacted": [bmr.units, bmr.elements],
    }.items():
        result = bmr.reduce(guide, groups=groups)
        print(result)
        compaction = result.compact(x[:BATCH], y[:BATCH])
        print(compaction)
        yield Network(name, compaction.model, compaction.guide, result.delta_f)
    small = copy.deepcopy(compaction)
    fit(small.model, small.guide, x, y, epochs // 5)
    yield Network(f"{name}, trained on", small.model, small.guide, result.delta_f)


def fit(model: Any, guide: Any, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train at one learning rate, and then at one that falls."""

    def lr(done: float) -> float:
        return 3e-3 * min(1.0, 2.02 - 2 * done)

    bmr.fit(model, guide, x, y, num_epochs=epochs, batch_size=128, lr=lr, estimator="local", seed=0)


def describe(network: Network, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Measure the free energy, and count the units of each layer."""
    shapes = [value.shape for value in network.guide.median().values() if value.dim() == 2]
    mean, error = bmr.free_energy(network.model, network.guide, x, y, num_samples=10)
    return {
        "widths": "-".join(str(size) for size in [shapes[0][1], *(shape[0] for shape in shapes)]),
        "predicted_delta_f": network.delta_f,
        "free_energy": mean,
        "free_energy_error": error,
    }


def judge(network: Network, x: Tensor, y: Tensor) -> dict[str, float]:
    """Score the mean class probabilities of unseen images."""
    module = bmr.to_module(network.model, network.guide, x[:BATCH], num_samples=NUM_DRAWS)
    with torch.no_grad():
        chances = torch.cat([module(part).softmax(-1).mean(0) for part in x.split(1000)])
    return {
        "accuracy": (chances.argmax(-1) == y).double().mean().item(),
        "nll": -chances[torch.arange(len(y)), y].log().mean().item(),
        "ece": calibration_error(chances, y).item(),
    }


def fill(page: str, table: pd.DataFrame) -> str:
    """Put the table of results into a page, between the comments that mark its place."""
    head = (
        "| | units | weights, non-zero | 20 draws | faster | accuracy | NLL | ECE | F (nats) "
        "| ΔF predicted |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    rows = [
        f"| {name} | {row['widths']} | {row['non-zero']:,} of {row['parameters']:,} "
        f"| {row['predictive (ms)']:.1f} ms | {row['predictive speed-up']:.1f} "
        f"| {row['accuracy']:.2%} | {row['nll']:.3f} | {row['ece']:.3f} "
        f"| {row['free_energy']:.0f} ± {row['free_energy_error']:.0f} "
        f"| {row['predicted_delta_f']:.0f} |\n"
        for name, row in table.iterrows()
    ]
    before, after = page.split("<!-- mnist -->")
    _, after = after.split("<!-- end mnist -->")
    return f"{before}<!-- mnist -->\n\n{head}{''.join(rows)}\n<!-- end mnist -->{after}"


if __name__ == "__main__":
    sys.exit(main())
