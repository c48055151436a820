"""Command line: ``python -m pyro_bmr demo`` and ``python -m pyro_bmr versions``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal, init_to_sample
from rich.console import Console
from rich.table import Table

from pyro_bmr import datasets, demo
from pyro_bmr.estimators.measurement import free_energy
from pyro_bmr.plots.canvas import load_pyplot
from pyro_bmr.plots.networks import plot_network
from pyro_bmr.reduction import reduce
from pyro_bmr.training.fitting import fit
from pyro_bmr.versions import draw_versions


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pyro_bmr", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("demo", help="train a Bayesian network, reduce it, and compare")
    command.add_argument("--data", default="diabetes", choices=["diabetes", "boston"])
    command.add_argument("--data-dir", type=Path, help="where uci/NAME.csv lies")
    command.add_argument("--epochs", type=int, default=300)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--figure", type=Path, default=Path("demo.png"), help="where to save it")
    command.set_defaults(run=_run_demo)
    command = commands.add_parser("versions", help="what to add to a report of an error")
    command.set_defaults(run=_print_versions)
    options = parser.parse_args(argv)
    options.run(options)


def _print_versions(_: argparse.Namespace) -> None:
    Console().print(draw_versions())


def _run_demo(options: argparse.Namespace) -> None:
    """Train, reduce, compare."""
    # What the last line needs is missed by the first.
    load_pyplot()
    # Where there is no terminal, as wide as print(result).
    console = Console(width=None if sys.stdout.isatty() else 100)
    data = datasets.load(options.data, options.data_dir)
    pyro.set_rng_seed(options.seed)
    order = torch.randperm(len(data.x), device="cpu")
    test, training = order[: len(order) // 5], order[len(order) // 5 :]
    inputs = demo.Standardization.of(data.x[training])
    target = demo.Standardization.of(data.y[training])
    x, y = inputs.apply(data.x), target.apply(data.y).squeeze(-1)

    console.print(
        f"[bold]{data.name}[/bold]: {len(training)} training and {len(test)} test rows; "
        f"a {x.shape[1]}-50-1 ReLU network, mean-field posterior"
    )
    network = demo.Regression(x.shape[1])
    full = AutoNormal(network, init_loc_fn=init_to_sample, init_scale=0.05)
    rows = (x[training], y[training])
    fit(network, full, *rows, num_epochs=options.epochs, batch_size=64, lr=2e-2)
    result = reduce(full, *rows)
    console.print(result)

    table = Table(
        "",
        title="What it did (mean ± standard error)",
        title_justify="left",
        caption="of the free energy over posterior draws, of the scores over test rows",
    )
    for column in ("free energy (nats)", "test RMSE", "test log-likelihood per row"):
        table.add_column(column, justify="right")
    energies = []

    def measure(label: str, model: Any, guide: Any) -> None:
        energy, error = free_energy(model, guide, *rows, num_samples=300)
        unit = float(target.scale)
        scores = demo.predictive_scores(model, guide, x[test], y[test], unit)
        table.add_row(label, f"{energy:.1f} ± {error:.1f}", *map(str, scores))
        energies.append(energy)

    measure("before", network, full)
    measure("reduced", result.model, result.guide)
    figure = plot_network(result, labels=data.inputs)[0].figure
    pruned = result.model, result.guide
    fit(*pruned, *rows, num_epochs=max(1, options.epochs // 5), batch_size=64, lr=1e-2)
    measure("refitted", result.model, result.guide)
    console.print(table)
    console.print(
        f"ΔF predicted {result.delta_f:+.1f} nats, realised {energies[1] - energies[0]:+.1f} nats"
    )

    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=110)
    console.print(f"The network before and after: {options.figure}")


if __name__ == "__main__":
    main()
