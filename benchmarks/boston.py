"""Prune a 13-50-1 network on Boston with each estimator, against the numbers of the paper.

Run with ``python benchmarks/boston.py --data-dir DIRECTORY``; writes ``benchmarks/boston.csv``.
Inputs are standardised, the target is as it is, the free energy is that of all 506 rows, as in
Beckers et al. (2022), arXiv:2210.09134. There the final free energy is 1457 by local
reparameterisation and 1455 by variance back-propagation, with 94.4 % pruned. The margin is that of
`pyro_bmr.by_evidence`: with -3, elements go that are worth less than three nats each.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_mean
from rich.console import Console
from torch import Tensor

import pyro_bmr as bmr
from pyro_bmr import datasets, demo

PRECISION = "precision"


def init_near_zero(site: Any) -> Tensor:
    """Start means at N(0, 0.01²), since units that start equal would stay so without sampling.

    Returns
    -------
    Tensor
        A value of the site.
    """
    mean = init_to_mean(site)
    return mean if site["name"] == PRECISION else mean + 0.01 * torch.randn_like(mean)


def decay(done: float) -> float:
    """Lower the learning rate linearly, from 0.01 to 0.0001.

    Returns
    -------
    float
        The learning rate.
    """
    return 1e-2 * (1 - done) + 1e-4


def run(
    estimator: str, margin: float, seed: int, epochs: int, refit_epochs: int, x: Tensor, y: Tensor
) -> dict[str, Any]:
    """Train, prune and measure once.

    Returns
    -------
    dict
        A row of the table.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = demo.Regression(x.shape[1])
    guide = bmr.mean_field(model, gamma=[PRECISION], init_loc_fn=init_near_zero)
    pruning = bmr.prune(
        model,
        guide,
        x,
        y,
        num_epochs=epochs,
        refit_epochs=refit_epochs,
        batch_size=16,
        lr=decay,
        estimator=estimator,
        select=bmr.by_evidence(margin=margin),
        keep="last",
    )
    Console().print(estimator, margin, seed, pruning)
    first = pruning.rounds[1]
    before = pruning.rounds[0].free_energy
    final, error = bmr.free_energy(
        pruning.model, pruning.guide, x, y, estimator=bmr.LocalELBO(), num_samples=1000
    )
    return {
        "estimator": estimator,
        "margin": margin,
        "seed": seed,
        "free_energy_before": before,
        "first_pruned %": 100 * first.sparsity,
        "first_predicted_delta_f": first.predicted,
        "first_realised_delta_f": first.realised,
        "rounds": pruning.kept_round,
        "pruned %": 100 * pruning.sparsity,
        "free_energy_after": final,
        "free_energy_after_error": error,
    }


def main() -> None:
    """Run all seeds and print the table with its means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=750)
    parser.add_argument("--refit-epochs", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--estimators", nargs="+", default=["global", "local", "moments"])
    parser.add_argument("--margins", type=float, nargs="+", default=[0.0, -3.0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = datasets.load("boston", options.data_dir)
    x, y = demo.Standardization.of(data.x).apply(data.x), data.y.squeeze(-1)
    rows = []
    epochs = options.epochs, options.refit_epochs
    for estimator, margin, seed in product(options.estimators, options.margins, options.seeds):
        rows.append(run(estimator, margin, seed, *epochs, x, y))
        table = pd.DataFrame(rows).set_index(["estimator", "margin", "seed"])
        table.to_csv(options.output, float_format="%.3f")
    print(table.round(2).to_string())
    print(table.groupby(["estimator", "margin"]).mean().round(2).to_string())


if __name__ == "__main__":
    main()
