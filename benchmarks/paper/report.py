"""Draw the figures and fill in the tables of the README and the docs, from ``results.csv``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tables
from figures import FIGURES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")

TABLES: Mapping[str, Callable[[pd.DataFrame, pd.Series], str]] = {
    "at a glance": lambda results, _: tables.glance_table(results),
    "time": lambda results, _: tables.computing_time(results),
    "boston": tables.boston_table,
    "methods on boston": lambda results, _: tables.methods_on_curve_table(results),
    "curves verdict": lambda results, _: tables.curves_verdict(results),
    "loops verdict": lambda results, _: tables.loops_verdict(results),
    "splits verdict": lambda results, _: tables.splits_verdict(results),
    "regression": lambda results, _: tables.summary_table(results, tables.REGRESSION),
    "signals": lambda results, _: tables.summary_table(results, tables.SIGNALS),
    "sine": tables.sine_table,
    "loops by method": lambda results, _: tables.loops_by_method_table(results),
    "rounds": lambda results, _: tables.rounds_table(results),
    "stopping": lambda results, _: tables.stopping_table(results),
    "splits": lambda results, _: tables.splits_table(results),
}


def filled(page: str, results: pd.DataFrame, published: pd.Series) -> str:
    """Put each table between the two comments that name it.

    Returns
    -------
    str
        The page.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]](results, published)}\n\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w ]+) -->).*?(<!-- end -->)", fill, page, flags=re.DOTALL)


def main() -> None:
    """Write the pages and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    results = tables.read_results(parser.parse_args().results)
    published = tables.read_published(HERE / "published.csv")
    for name, draw in FIGURES.items():
        figure = draw(results, published)
        figure.savefig(ROOT / "docs" / "images" / f"results-{name}.png", dpi=90)
        plt.close(figure)
    for page in PAGES:
        page.write_text(filled(page.read_text(), results, published))


if __name__ == "__main__":
    main()
