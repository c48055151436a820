"""Command line: ``python -m pyro_bmr demo`` and ``python -m pyro_bmr versions``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from pyro_bmr import datasets, demo
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
    data = datasets.load(options.data, options.data_dir)
    demo.run(data, epochs=options.epochs, seed=options.seed, figure=options.figure)


if __name__ == "__main__":
    main()
