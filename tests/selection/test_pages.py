"""Two pages, "Coming from SPM" and "Variable selection", have the tables of their benchmarks."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, pd.read_csv(ROOT / "benchmarks" / f"{name}.csv")


@pytest.mark.parametrize("name", ["spm", "variable_selection"])
def test_the_tables_of_a_page_are_what_was_measured(name):
    benchmark, table = load(name)
    page = benchmark.PAGE.read_text()
    assert benchmark.fill(page, table) == page
    table[table.select_dtypes("number").columns] += 1
    assert benchmark.fill(page, table) != page


def test_delta_f_and_searches_beside_spm():
    _, table = load("spm")
    rows = table[table["what"] == "delta_f"]
    assert len(rows) == 2 and (rows["difference"] < 1e-10).all()
    rows = table[table["what"] == "search"].set_index("problem")
    assert set(rows.index) == {"fmri_a", "fmri_b", "erp_a", "eeg_correlated_prior"}
    assert rows["by_blocks"].to_numpy() == pytest.approx(rows["spm"].to_numpy(), abs=1e-4)
    assert (rows["by_evidence"] >= rows["by_blocks"] - 1e-4).all()
    assert rows.loc["erp_a", "by_evidence"] > rows.loc["erp_a", "by_blocks"] + 0.5


def test_presence_beside_pp():
    _, table = load("spm")
    rows = table[table["what"] == "presence"]
    twelve = rows[rows["parameters"] == 12]
    assert len(twelve) == 4 and (twelve["error"] < 1e-9).all()
    # Pp is off by far more than presence can be.
    assert (rows["difference"] > 5 * rows["error"]).all() and (rows["difference"] > 0.4).all()


def test_predictions_of_chosen_inputs_beside_importance_sampling():
    _, table = load("variable_selection")
    off = (table["predicted"] - table["sampled"]).abs()
    assert (table["error"] < 0.05).all()
    assert (off[table["posterior"] == "lowest free energy"] < 0.3).all()
    laplace = table["posterior"].eq("Laplace")
    assert (off[laplace & table["regression"].eq("logistic")] > 0.5).all()
    assert (off[laplace & table["regression"].eq("Poisson")] < 0.3).all()
