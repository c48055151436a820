"""Whether F ever rises when a reduction is given the data: 200 random small problems.

Run with ``python benchmarks/never_worse.py``; writes ``benchmarks/never_worse.csv``, one row per
case, and goes on where it was stopped. A case is a linear model, a tanh or a ReLU network; its
guide is independent, correlated or of low rank, and has been trained for 0, 10, 100 or 1000 steps.
See ``tests/never_worse.py``. Everything is in nats: the ΔF that was predicted, and the one that
comes true at random numbers which the selection has not seen, with its standard error. ``seconds``
are those of the reduction, of one CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from never_worse import make_case, measure, reduce, rose  # noqa: E402

COLUMNS = ["case", "model", "guide", "steps", "predicted", "realised", "error", "seconds"]


def main() -> None:
    """Run the cases that are not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.out.exists():
        pd.DataFrame(columns=COLUMNS).to_csv(options.out, index=False)
    done = set(pd.read_csv(options.out)["case"])
    for number in range(options.cases):
        if number not in done:
            row = pd.DataFrame([run(number)], columns=COLUMNS).round(4)
            row.to_csv(options.out, mode="a", header=False, index=False)
    table = pd.read_csv(options.out)
    risen = [rose(*pair) for pair in zip(table["realised"], table["error"], strict=True)]
    print(f"F rose beyond three standard errors in {sum(risen)} of {len(table)} cases")
    print(table.groupby(["model", "guide"])[["predicted", "realised", "seconds"]].mean().round(2))


def run(number: int) -> tuple[int | float | str, ...]:
    """Reduce a case and measure.

    Returns
    -------
    tuple
        In the order of ``COLUMNS``.
    """
    case = make_case(number)
    start = time.process_time()
    result = reduce(case)
    seconds = time.process_time() - start
    names = case.model_name, case.guide_name, case.steps
    return number, *names, result.delta_f, *measure(case, result), seconds


if __name__ == "__main__":
    main()
