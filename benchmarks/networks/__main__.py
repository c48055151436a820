"""Train and prune networks by each method, and score them: ``python benchmarks/networks``.

What is in the file of results is not computed again. Trained networks are kept in a folder, round
by round, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import bayesian_compression
import dense
import magnitude
import numpy as np
import ours
import pandas as pd
import sparse_vd
from filelock import FileLock
from problems import PROBLEMS, Problem, load_problem
from scoring import count, judge

RESULTS = Path(__file__).with_name("results.csv")
RIVALS = {
    "dense": dense.train,
    "magnitude": magnitude.train,
    "sparse vd": sparse_vd.train,
    "bc-gnj": bayesian_compression.train,
}
METHODS = (*ours.RECIPES, *RIVALS)
KEY = ["network", "method", "seed", "level"]
COLUMNS = (
    *KEY,
    *("epochs", "seconds", "weights", "compression", "widths", "flops"),
    *("error", "nll", "ece", "brier", "auroc_rotated", "auroc_cifar10", "auroc_mnist"),
    *("free_energy", "free_energy_error", "predictive_ms", "dense_predictive_ms"),
)


def main() -> None:
    """Compute what is not in the file yet."""
    options = _options()
    for name in options.networks:
        for seed, method in product(options.seeds, options.methods):
            cell = Cell(name, method, seed)
            if cell not in _find_cells(options.output):
                problem = _take_part(load_problem(name, options.data_dir), options)
                rows = list(_run(cell, problem, options.work, options.output))
                _add(options.output, rows)


@dataclass(frozen=True)
class Cell:
    """One run of a method; its rows are written together."""

    network: str
    method: str
    seed: int


def _run(cell: Cell, problem: Problem, work: Path, output: Path) -> Iterator[dict[str, Any]]:
    """Train and prune; yields a row for each network on the way, and keeps a first layer."""
    folder = work / "-".join(map(str, vars(cell).values())).replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if cell.method in RIVALS:
        networks = RIVALS[cell.method](problem, cell.seed, folder)
    else:
        networks = ours.train(problem, cell.seed, ours.RECIPES[cell.method], folder)
    for one in networks:
        path = folder / f"{one.level:g}.json"
        if not path.exists():
            row = {"level": one.level, "epochs": one.epochs, "seconds": one.seconds, **vars(cell)}
            row |= judge(one.predict, problem)
            row |= one.measure() if one.measure else count(problem, one.weights)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(row))
            partial.replace(path)
        row = json.loads(path.read_text())
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        yield row
    if cell.method == "bmr" and cell.seed == 0:
        first = next(value for value in one.weights.values() if value.dim() > 1)
        np.savez_compressed(output.with_name(f"first-layer-{cell.network}.npz"), weights=first)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument

    def choose(name: str, choices: Sequence[Any], default: Sequence[Any]) -> None:
        text = f"of {', '.join(map(str, choices))}"
        add(name, nargs="+", type=type(choices[0]), choices=choices, default=default, help=text)

    add("--data-dir", type=Path, help="with mnist/ and cifar10/, as pyro_bmr.datasets reads them")
    add("--output", type=Path, default=RESULTS)
    add(
        "--work",
        type=Path,
        required=True,
        help="where networks are kept as far as they are trained",
    )
    choose("--networks", tuple(PROBLEMS), tuple(PROBLEMS))
    choose("--methods", METHODS, METHODS)
    choose("--seeds", range(10), range(3))
    add("--epochs", type=float, default=1.0, help="part of the epochs, for a try; needs --output")
    add("--rows", type=int, help="of the data, so many, for a try; needs --output")
    add("--rounds", type=int, help="so many, for a try; needs --output")
    add("--draws", type=int, help="of the weights, so many, for a try; needs --output")
    options = parser.parse_args()
    a_try = options.epochs != 1 or options.rows or options.rounds or options.draws
    if a_try and options.output == RESULTS:
        parser.error("this is for a try. Expected --output, another file than that of the docs")
    return options


def _take_part(problem: Problem, options: argparse.Namespace) -> Problem:
    schedule = problem.schedule
    lengths = (schedule.first, *schedule.rounds[: options.rounds])
    first, *rounds = (math.ceil(options.epochs * length) for length in lengths)
    rows = slice(options.rows)
    return replace(
        problem,
        schedule=replace(schedule, first=first, rounds=tuple(rounds)),
        draws=options.draws or problem.draws,
        **{name: getattr(problem, name)[rows] for name in ("x", "y", "x_test", "y_test")},
        strange={name: images[rows] for name, images in problem.strange.items()},
    )


def _find_cells(path: Path) -> set[Cell]:
    keys = _read(path)[[field.name for field in fields(Cell)]]
    return {Cell(*key) for key in keys.itertuples(index=False)}


def _add(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the rows of a cell into the file, which another process may do as well."""
    with FileLock(f"{path}.lock"):
        table = pd.concat([_read(path), pd.DataFrame(rows, columns=COLUMNS)])
        partial = path.with_suffix(".partial")
        table.sort_values(KEY, kind="stable").to_csv(partial, index=False, float_format="%.6g")
        partial.replace(path)


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)


if __name__ == "__main__":
    main()
