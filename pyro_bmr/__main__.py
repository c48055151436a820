"""Command line: ``python -m pyro_bmr demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pyro_bmr import datasets, demo
from pyro_bmr.reduction import reduce


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; those of the process otherwise.

    Examples
    --------
    >>> main(["--help"])
    Traceback (most recent call last):
        ...
    SystemExit: 0
    """
    parser = argparse.ArgumentParser(prog="python -m pyro_bmr", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "demo", help="train a Bayesian network, reduce it, and compare"
    )
    command.add_argument("--data", default="diabetes", choices=["diabetes", "boston"])
    command.add_argument("--data-dir", type=Path, help="where uci/NAME.csv lies")
    command.add_argument("--epochs", type=int, default=400)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--figure", type=Path, default=Path("demo.png"), help="where to save it")
    command.set_defaults(run=run_demo)
    options = parser.parse_args(argv)
    options.run(options)


def run_demo(options: argparse.Namespace) -> None:
    """Train, reduce, compare.

    Parameters
    ----------
    options : Namespace
        Of the command line.
    """
    console = Console()
    data = datasets.load(options.data, options.data_dir)
    pyro.set_rng_seed(options.seed)
    order = torch.randperm(len(data.x))
    test, training = order[: len(order) // 5], order[len(order) // 5 :]
    inputs = demo.Standardization.of(data.x[training])
    target = demo.Standardization.of(data.y[training])
    x, y = inputs.apply(data.x), target.apply(data.y).squeeze(-1)

    console.print(
        f"[bold]{data.name}[/bold]: {len(training)} training and {len(test)} test rows; "
        f"a {x.shape[1]}-50-1 ReLU network, mean-field posterior"
    )
    network = demo.Regression(x.shape[1])
    with Progress(console=console) as progress:
        full = demo.train(
            network,
            x[training],
            y[training],
            epochs=options.epochs,
            batch_size=64,
            lr=2e-2,
            progress=progress,
        )
    result = reduce(full)
    console.print(result)

    table = Table(title="What it did", title_justify="left")
    for column in ("", "free energy (nats)", "test RMSE", "test log-likelihood a row"):
        table.add_column(column, justify="right")
    unit = float(target.scale)
    pairs: dict[str, tuple[Any, Any]] = {
        "before": (network, full),
        "after": (result.model, result.guide),
    }
    for label, (model, guide) in pairs.items():
        energy, error = demo.free_energy(model, guide, x[training], y[training])
        scores = demo.predictive_scores(model, guide, x[test], y[test], unit)
        table.add_row(label, f"{energy:.1f} ± {error:.1f}", *map(str, scores))
    console.print(table)

    options.figure.parent.mkdir(parents=True, exist_ok=True)
    demo.plot_weights(full, result, data.inputs).savefig(options.figure, dpi=150)
    console.print(f"The weights before and after: {options.figure}")


if __name__ == "__main__":
    main()
