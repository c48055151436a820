"""Reproduce the paper, and go beyond it: ``python benchmarks/paper --data-dir DIRECTORY``.

Trains, prunes and measures all networks, or those asked for, and writes
``benchmarks/paper/results.csv``: a row a point. What is in the file is not computed again, so that
a run that was stopped goes on. ``python benchmarks/paper/report.py`` draws the page from it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from experiments import BASELINES, COLUMNS, Cell, run
from problems import REGRESSION, SIGNALS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METHODS = (*BASELINES, "scratch", "longer")
SIGNAL_SEEDS = LOOP_SEEDS = 3
KEY = ["dataset", "estimator", "seed", "split"]


def main() -> None:
    """Compute all cells that are not in the file yet."""
    options = _options()
    table = _read(options.output)
    cells = list(_remaining(_cells(options), table))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(options.jobs, mp_context=context) as pool,
    ):
        task = progress.add_task("networks", total=len(cells))
        futures = {pool.submit(run, cell, options.data_dir, options.epochs): cell for cell in cells}
        for future in as_completed(futures):
            cell = futures[future]
            _add(options.output, cell, future.result())
            name = " ".join(
                str(getattr(cell, key)) for key in KEY if getattr(cell, key) is not None
            )
            progress.update(task, advance=1, description=name)
            if not progress.console.is_terminal:
                print(f"{progress.tasks[task].completed:.0f}/{len(cells)} {name}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="with uci/NAME.csv and uci/NAME.splits.json")
    add("--output", type=Path, default=Path(__file__).with_name("results.csv"))
    add("--experiments", nargs="+", default=["one-shot", "iterative", "splits"])
    add("--datasets", nargs="+", default=[*REGRESSION, *SIGNALS])
    add("--estimators", nargs="+", default=["global", "local", "moments"])
    add("--methods", nargs="+", default=METHODS, help="next to bmr, which is always there")
    add("--seeds", type=int, nargs="+", default=range(5), help="for signals those below 3")
    add("--splits", type=int, nargs="+", default=range(5), help="of 0 to 19")
    add("--epochs", type=float, default=1.0, help="part of the epochs, for a try")
    add("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield all networks, seed by seed, so that a part of the run is a smaller experiment.

    The paper's way, curve and loop, is gone by every network. The other methods are compared with
    it on fewer: their curves on all networks for boston and on the first of each other kind, their
    loops and the dense networks for regression with one estimator.

    Yields
    ------
    Cell
        In the order in which they are computed.
    """
    baselines = [method for method in options.methods if method in BASELINES]
    for seed, dataset, estimator in product(options.seeds, options.datasets, options.estimators):
        if dataset in SIGNALS and seed >= SIGNAL_SEEDS:
            continue
        compared = baselines if dataset == "boston" or seed == 0 else []
        looped = estimator == "local" and dataset in REGRESSION and seed < LOOP_SEEDS
        yield Cell(
            *(dataset, estimator, seed, None),
            curves=("bmr", *compared) if "one-shot" in options.experiments else (),
            loops=("bmr", *looped * tuple(options.methods))
            if "iterative" in options.experiments
            else (),
        )
    if "splits" in options.experiments:
        regression = [name for name in options.datasets if name in REGRESSION]
        for split, dataset, estimator in product(options.splits, regression, options.estimators):
            yield Cell(dataset, estimator, 0, split, curves=(), loops=("bmr",))


def _remaining(cells: Iterable[Cell], table: pd.DataFrame) -> Iterator[Cell]:
    """Leave out what a table has.

    Yields
    ------
    Cell
        With the methods that are not there yet.
    """
    for cell in cells:
        mine = table[_of(cell, table)]
        found = set(zip(mine.experiment, mine.method, strict=True))
        loop = "iterative" if cell.split is None else "splits"
        curves = tuple(name for name in cell.curves if ("one-shot", name) not in found)
        loops = tuple(name for name in cell.loops if (loop, name) not in found)
        if (loop, "unpruned") in found and "bmr" in loops:
            # Nothing was to be pruned, so that there was no fraction for other methods either.
            loops = ()
        if curves or loops:
            # Other methods go by the fractions of this one.
            loops = ("bmr", *(name for name in loops if name != "bmr")) if loops else ()
            yield replace(cell, curves=curves, loops=loops)


def _add(path: Path, cell: Cell, rows: list[dict[str, Any]]) -> None:
    """Put the rows of a cell into the file, in place of those that it has."""
    table, new = _read(path), pd.DataFrame(rows, columns=COLUMNS)
    which = ["experiment", "method"]
    stale = _of(cell, table) & table.set_index(which).index.isin(new.set_index(which).index)
    table = pd.concat([table[~stale], new] if len(table) else [new])
    table = table.sort_values([*KEY, "experiment"], kind="stable")
    partial = path.with_suffix(".partial")
    table.to_csv(partial, index=False, float_format="%.7g")
    partial.replace(path)


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, dtype={"split": "Int64"})


def _of(cell: Cell, table: pd.DataFrame) -> pd.Series:
    same_split = table.split.isna() if cell.split is None else table.split.eq(cell.split)
    same = [table[key].eq(getattr(cell, key)) for key in ("dataset", "estimator", "seed")]
    return same_split.fillna(False).astype(bool) & same[0] & same[1] & same[2]


if __name__ == "__main__":
    main()
