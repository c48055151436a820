"""What `benchmarks/memory.py` has measured, and the pages that quote it."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "memory.py"
spec = importlib.util.spec_from_file_location("memory", FILE)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
TABLE = pd.read_csv(benchmark.RESULTS)


@pytest.mark.parametrize("path", benchmark.PAGES, ids=lambda path: path.stem)
def test_the_page_has_what_was_measured(path):
    page = path.read_text()
    assert benchmark.fill(page, TABLE) == page
    assert benchmark.fill(page, TABLE.assign(peak=TABLE["peak"] + 1)) != page


def test_both_verbs_were_measured():
    assert set(TABLE["verb"]) == {"fit", "reduce"}
    assert (TABLE.groupby("verb")["weights"].max() >= 20_000_000).all()


def test_training_is_within_its_bound():
    assert not benchmark.find_missed(TABLE[TABLE["verb"] == "fit"])


def test_reduce_takes_what_it_returns_and_no_more():
    # Of each weight a location, a scale and a score in float32, and two masks.
    rows = TABLE[TABLE["verb"] == "reduce"]
    assert (rows["peak"] <= 14.5).all() and (rows["peak"] - rows["after"] <= 0.5).all()


@pytest.mark.xfail(
    reason="what reduce returns is 13 bytes, and its second mask one more", strict=True
)
def test_reduce_is_within_its_bound():
    assert not benchmark.find_missed(TABLE[TABLE["verb"] == "reduce"])
