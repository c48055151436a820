"""Sparse regression under a horseshoe: `benchmarks/horseshoe.py` does it with 20 seeds."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

import pyro_bmr as bmr

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "horseshoe.py"
spec = importlib.util.spec_from_file_location("horseshoe", SCRIPT)
horseshoe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(horseshoe)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "non-centred"])
def test_the_true_coefficients_stay_and_most_others_go(centred, seed):
    x, y, coefficients = horseshoe.make_data(seed)
    model = horseshoe.make_model(centred=centred)
    guide = horseshoe.train_mean_field(model, x, y, seed)
    true = coefficients != 0
    dropped = []
    for margin in (0.0, -1.0):
        select = bmr.by_evidence(margin=margin)
        result = bmr.reduce(guide, args=(x, y), sites=["b"], select=select)
        kept = result.masks["b"]
        assert kept[true].all()
        assert result.delta_f < 0
        dropped.append(int((~kept[~true]).sum()))
    assert dropped[0] >= 75
    assert dropped[1] >= (80 if centred else 90)


def test_the_table_of_all_seeds_says_what_was_promised():
    """Of 95 coefficients that are zero at least 90 go, in every seed, with the 5 others kept."""
    table = pd.read_csv(SCRIPT.with_suffix(".csv"))
    assert (table["kept_true"] == 5).all()
    promised = table[(table["form"] == "non-centred") & (table["margin"] == -1)]
    assert promised.groupby("guide").size().tolist() == [20, 20]
    assert (promised["dropped_rest"] >= 90).all()
