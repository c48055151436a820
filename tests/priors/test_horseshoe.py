"""Sparse regression under a horseshoe: `benchmarks/horseshoe.py` does it with 40 seeds."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from often import often

import pyro_bmr as bmr

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "horseshoe.py"
spec = importlib.util.spec_from_file_location("horseshoe", SCRIPT)
horseshoe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(horseshoe)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.rare)])
@pytest.mark.parametrize("centred", often([True, False], False), ids=["centred", "non-centred"])
def test_the_true_coefficients_stay_and_most_others_go(centred, seed):
    x, y, coefficients = horseshoe.make_data(seed)
    model = horseshoe.make_model(centred=centred)
    guide = horseshoe.train_mean_field(model, x, y, seed)
    result = bmr.reduce(guide, x, y, sites=["b"])
    kept, true = result.masks["b"], coefficients != 0
    assert kept[true].all()
    assert (~kept[~true]).sum() >= (75 if centred else 85)
    assert result.delta_f < 0


@pytest.mark.rare
def test_a_dense_guide_drops_at_least_90_of_95():
    x, y, coefficients = horseshoe.make_data(2)
    start = horseshoe.train_mean_field(horseshoe.make_model(centred=True), x, y, 2)
    model = horseshoe.make_model(centred=False)
    result = bmr.reduce(horseshoe.train_dense(model, start, x, y, 2), x, y, sites=["b"])
    kept, true = result.masks["b"], coefficients != 0
    assert kept[true].all()
    assert (~kept[~true]).sum() >= 90


def horseshoe_table():
    table = pd.read_csv(SCRIPT.with_suffix(".csv"))
    lines = [
        "| form | guide | margin | of 5 kept: fewest, mean | of 95 dropped: fewest, mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (form, guide, margin), rows in table.groupby(["form", "guide", "margin"], sort=False):
        kept, dropped = rows["kept_true"], rows["dropped_rest"]
        lines.append(
            f"| {form} | `{guide}` | {margin:g} | {kept.min()}, {kept.mean():.2f} "
            f"| {dropped.min()}, {dropped.mean():.1f} |"
        )
    return "\n".join(lines)


def test_the_page_quotes_the_table():
    assert (
        horseshoe_table() in (SCRIPT.parents[1] / "docs" / "mathematics" / "priors.md").read_text()
    )


def test_the_table_of_all_seeds_says_what_was_promised():
    """Of 95 coefficients that are zero at least 90 go, and the 5 others stay, in every seed."""
    table = pd.read_csv(SCRIPT.with_suffix(".csv"))
    dense = table[(table["guide"] == "AutoMultivariateNormal") & (table["margin"] == 0)]
    assert sorted(dense["seed"]) == list(range(40))
    assert (dense["kept_true"] == 5).all()
    assert (dense["dropped_rest"] >= 90).all()
    centred = table[table["form"] == "centred"]
    assert (centred["kept_true"] == 5).all()
