"""What `benchmarks/scaling.py` has measured, and the page that quotes it."""

import importlib
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    scaling, page = (importlib.import_module(name) for name in ("scaling", "scaling_page"))

TABLE = pd.read_csv(page.RESULTS)
EXPONENTS = page.find_exponents(TABLE)
INDEPENDENT = ["fit", "reduce", "presence", "compact", "to_arviz"]
CORRELATED = ["reduce, correlated", "presence, correlated"]


def test_the_page_has_what_was_measured():
    text = page.PAGE.read_text()
    assert page.fill(text, page.read_sources(TABLE)) == text
    for what in page.QUANTITIES:
        other = TABLE.assign(**{what: 1.5 * TABLE[what]})
        assert page.fill(text, page.read_sources(other)) != text
    pd.testing.assert_frame_equal(pd.read_csv(page.EXPONENTS), EXPONENTS)


def test_every_verb_was_measured_over_three_decades():
    measured = {(verb, size) for verb, one in scaling.VERBS.items() for size in one.sizes}
    assert set(zip(TABLE["verb"], TABLE["size"], strict=True)) == measured
    assert set(TABLE["verb"]) == {*INDEPENDENT, *CORRELATED}
    sizes = TABLE.groupby("verb")["size"]
    assert (sizes.max() >= 1000 * sizes.min()).all()


@pytest.mark.parametrize("what", page.QUANTITIES)
def test_independent_elements_cost_the_same_each(what):
    rows = EXPONENTS[EXPONENTS["verb"].isin(INDEPENDENT) & (EXPONENTS["quantity"] == what)]
    assert len(rows) == 5 and rows["exponent"].between(0.75, 1.2).all()


def test_correlated_elements_take_up_to_the_third_power_of_time_and_the_square_of_memory():
    rows = EXPONENTS[EXPONENTS["verb"].isin(CORRELATED)].set_index("quantity")
    assert (rows.loc["seconds", "exponent"] <= 3.0).all()
    assert (rows.loc["seconds", "most"] <= 3.1).all()
    assert (rows.loc["MiB", "most"] <= 2.1).all()


def test_an_exponent_is_that_of_a_power():
    size = np.array([1, 10, 30, 100, 300, 1000])
    table = pd.DataFrame({"verb": "any", "size": size, "seconds": 2e-9 * size**2.5, "MiB": size})
    # Of the smallest something else is seen.
    table.loc[:1, "seconds"] = 0.1
    found = page.find_exponents(table).set_index("quantity")
    assert found.loc["seconds", ["exponent", "least", "most"]].tolist() == [2.5, 2.5, 2.5]
    assert found.loc["MiB", "exponent"] == 1.0
    assert (found["from"] == 30).all()


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_sends_so_much(ranks):
    """Sums go round by parts, then what they have become, and each rank sends a part at a time."""
    message = [[float(10 * rank + part) for part in range(ranks)] for rank in range(ranks)]
    total = [sum(column) for column in zip(*message, strict=True)]
    sent = 0
    for step in range(2 * (ranks - 1)):
        moving = [(rank, (rank - step) % ranks) for rank in range(ranks)]
        values = [message[rank][part] for rank, part in moving]
        for (rank, part), value in zip(moving, values, strict=True):
            after = message[(rank + 1) % ranks]
            after[part] = value + (after[part] if step < ranks - 1 else 0.0)
        sent += 1 / ranks
    assert list(chain(*message)) == total * ranks
    weights = 1000
    assert page.ring_bytes(weights, ranks) == pytest.approx(sent * (8 * weights + 4))


@pytest.mark.rare
def test_a_run_that_was_stopped_goes_on(tmp_path, capsys):
    call = ["--quick", "--verbs", "reduce, correlated", "--output", str(tmp_path / "found.csv")]
    scaling.main(call)
    found = pd.read_csv(tmp_path / "found.csv")
    assert found["size"].tolist() == [3, 10] and (found["seconds"] > 0).all()
    found.iloc[:1].to_csv(tmp_path / "found.csv", index=False)
    scaling.main(call)
    again = pd.read_csv(tmp_path / "found.csv")
    pd.testing.assert_frame_equal(again.iloc[:1], found.iloc[:1])
    assert again["size"].tolist() == [3, 10]
    scaling.main(call)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "found.csv"), again)
