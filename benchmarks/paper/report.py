"""Draw the figures and fill in the tables of the README and the docs, from files of results.

These are ``results.csv`` and ``with_data.csv`` of ``benchmarks/paper``, ``predictions.csv`` of
``predictions.py``, and ``published.csv``, the numbers of the paper.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tables
import with_data
from figures import FIGURES
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


@dataclass(frozen=True)
class Sources:
    """What the tables are made of."""

    results: pd.DataFrame
    with_data: pd.DataFrame
    predictions: pd.DataFrame
    published: pd.Series


TABLES: Mapping[str, Callable[[Sources], str]] = {
    "at a glance": lambda of: tables.glance_table(of.results),
    "time": lambda of: tables.computing_time(of.results),
    "boston": lambda of: tables.boston_table(of.results, of.published),
    "methods on boston": lambda of: tables.methods_on_curve_table(of.results),
    "curves verdict": lambda of: tables.curves_verdict(of.results),
    "loops verdict": lambda of: tables.loops_verdict(of.results),
    "splits verdict": lambda of: tables.splits_verdict(of.results),
    "regression": lambda of: tables.summary_table(of.results, of.with_data, tables.REGRESSION),
    "signals": lambda of: tables.summary_table(of.results, of.with_data, tables.SIGNALS),
    "sine": lambda of: tables.sine_table(of.results, of.published),
    "loops by method": lambda of: tables.loops_by_method_table(of.results),
    "rounds": lambda of: tables.rounds_table(of.results),
    "splits": lambda of: tables.splits_table(of.results),
    "stopping": lambda of: with_data.once_table(of.with_data),
    "stopping verdict": lambda of: with_data.once_verdict(of.with_data),
    "frontier": lambda of: with_data.frontier_table(of.with_data),
    "predictions": lambda of: with_data.predictions_table(of.predictions),
    "measured rounds": lambda of: with_data.rounds_table(of.with_data, of.results),
    "measured rounds verdict": lambda of: with_data.rounds_verdict(of.with_data, of.results),
    "time with data": lambda of: with_data.computing_time(of.with_data, of.predictions),
}


def read_sources(results: Path = HERE / "results.csv") -> Sources:
    """Read the files of results.

    Returns
    -------
    Sources
        What the tables are made of.
    """
    return Sources(
        tables.read_results(results),
        tables.read_results(HERE / "with_data.csv"),
        pd.read_csv(HERE / "predictions.csv"),
        tables.read_published(HERE / "published.csv"),
    )


def filled(page: str, sources: Sources) -> str:
    """Put each table between the two comments that name it.

    Returns
    -------
    str
        The page.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]](sources)}\n\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w ]+) -->).*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def main() -> None:
    """Write the pages and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    sources = read_sources(parser.parse_args().results)
    for name, draw in FIGURES.items():
        figure = draw(sources.results, sources.published)
        path = ROOT / "docs" / "images" / f"results-{name}.png"
        figure.savefig(path, dpi=90)
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
        plt.close(figure)
    for page in PAGES:
        page.write_text(filled(page.read_text(), sources))


if __name__ == "__main__":
    main()
