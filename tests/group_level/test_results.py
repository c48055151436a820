"""What `benchmarks/group_level.py` measured, beside the scheme of SPM written in numpy."""

from pathlib import Path

import pandas as pd

TABLE = pd.read_csv(Path(__file__).parents[2] / "benchmarks" / "group_level.csv")


def test_the_true_set_of_zeros_is_chosen_as_often():
    rows = TABLE[TABLE["what"] == "chosen"]
    assert len(rows) == 4
    assert (rows["studies"] >= 200).all()
    assert (rows["ours"] >= rows["naive"]).all()


def test_intervals_covered_where_the_prior_of_the_variance_allows_for_it():
    rows = TABLE[TABLE["what"] == "chosen"]
    rows = rows[(rows["spread"] == 1) | (rows["variance"] == 4)]
    assert len(rows) == 3
    assert rows["covered ours"].between(0.85, 0.95).all()


def test_it_was_fast():
    rows = TABLE[TABLE["what"] == "seconds"]
    assert list(rows["components"]) == ["single", "fields", "all"]
    assert (rows["ours"] < 5).all()
    assert (rows["ratio"] > 1).all()
