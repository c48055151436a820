"""Reproduce the paper, and go beyond it: ``python benchmarks/paper --data-dir DIRECTORY``.

Trains, prunes and measures all networks, or those asked for, and writes
``benchmarks/paper/results.csv``, one row per point. What is in the file is not computed again, so
that a run that was stopped goes on. ``python benchmarks/paper/report.py`` draws the page from it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from experiments import BASELINES, COLUMNS, MEASURED, Cell, run
from problems import REGRESSION, SIGNALS
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METHODS = ("bmr", *BASELINES, *MEASURED, "scratch", "longer")
EXPERIMENTS = ("one-shot", "iterative", "splits")
ESTIMATORS = ("global", "local", "moments")
RESULTS = Path(__file__).with_name("results.csv")
SIGNAL_SEEDS = LOOP_SEEDS = 3
KEY = ["dataset", "estimator", "seed", "split"]


def main() -> None:
    """Compute what is not in the file yet."""
    options = _options()
    cells = list(_remaining(_cells(options), _read(options.output)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    failed = []
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(options.jobs, mp_context=context) as pool,
    ):
        task = progress.add_task("networks", total=len(cells))
        how = options.data_dir, options.epochs, options.networks
        futures = {pool.submit(run, cell, *how): cell for cell in cells}
        try:
            for future in as_completed(futures):
                cell = futures[future]
                if future.exception():
                    failed.append(f"{_name(cell)}: {future.exception()}")
                else:
                    _add(options.output, cell, future.result())
                progress.update(task, advance=1, description=_name(cell))
                if not progress.console.is_terminal:
                    done = f"{progress.tasks[task].completed:.0f}/{len(cells)}"
                    print(done, _name(cell), "failed" * bool(future.exception()), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        sys.exit("These failed, and are tried again next time:\n" + "\n".join(failed))


def _name(cell: Cell) -> str:
    split = "" if cell.split is None else f" split {cell.split}"
    return f"{cell.dataset} {cell.estimator} seed {cell.seed}{split}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument

    def choose(name: str, choices: Sequence[Any], default: Sequence[Any], text: str = "") -> None:
        kind = type(choices[0])
        add(name, nargs="+", type=kind, choices=choices, default=default, metavar="X", help=text)

    add("--data-dir", type=Path, help="with uci/NAME.csv and uci/NAME.splits.json")
    add("--networks", type=Path, help="where trained networks are kept, to be trained only once")
    add("--output", type=Path, default=RESULTS)
    choose("--experiments", EXPERIMENTS, EXPERIMENTS, f"of {EXPERIMENTS}")
    choose("--datasets", (*REGRESSION, *SIGNALS), (*REGRESSION, *SIGNALS))
    choose("--estimators", ESTIMATORS, ESTIMATORS, f"of {ESTIMATORS}")
    choose("--methods", METHODS, METHODS, f"of {METHODS}; those of the paper need bmr")
    choose("--seeds", range(100), range(5), "for signals those below 3")
    choose("--splits", range(20), range(5), "of 0 to 19")
    add("--epochs", type=float, default=1.0, help="part of the epochs, for a try; needs --output")
    add("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.epochs != 1 and options.output == RESULTS:
        parser.error("--epochs is for a try. Expected --output, another file than that of the docs")
    return options


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
        compared = [m for m in options.methods if m in {"bmr", *compared, *MEASURED}]
        is_compared = estimator == "local" and dataset in REGRESSION and seed < LOOP_SEEDS
        loops = {"bmr", "measured"} | (set(METHODS) - {*MEASURED} if is_compared else set())
        loops = [method for method in options.methods if method in loops]
        yield Cell(
            *(dataset, estimator, seed, None),
            curves=tuple(compared) if "one-shot" in options.experiments else (),
            loops=tuple(loops) if "iterative" in options.experiments else (),
        )
    if "splits" in options.experiments and "bmr" in options.methods:
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
            # Other methods go by the fractions of this one, but for the one that measures.
            if any(name != "measured" for name in loops):
                loops = ("bmr", *(name for name in loops if name != "bmr"))
            yield replace(cell, curves=curves, loops=loops)


def _add(path: Path, cell: Cell, rows: list[dict[str, Any]]) -> None:
    """Put the rows of a cell into the file, in place of those that it has.

    If the network itself came out otherwise, none of its old rows stays.
    """
    table, new = _read(path), pd.DataFrame(rows, columns=COLUMNS)
    which = ["experiment", "method"]
    mine = _of(cell, table)
    stale = mine & table.set_index(which).index.isin(new.set_index(which).index)
    before, after = (
        rows_of[rows_of.method == "unpruned"].set_index("experiment").free_energy.astype(float)
        for rows_of in (table[mine], new)
    )
    if ((before - after).abs() / after.abs()).max() > 1e-5:
        stale = mine
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
