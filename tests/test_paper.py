"""The experiments of the paper: a small slice of them, and that the pages quote their results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "benchmarks" / "paper"
COLUMNS = {
    *("experiment", "dataset", "estimator", "seed", "split", "method", "pruned"),
    *("free_energy", "complexity", "accuracy", "predicted_delta_f", "rmse"),
    *("test_log_likelihood", "seconds"),
}


@pytest.fixture(scope="module")
def modules():
    """The modules of the experiments, which are no package."""
    sys.path.insert(0, str(PAPER))
    yield {name: importlib.import_module(name) for name in ("problems", "tables", "report")}
    sys.path.remove(str(PAPER))


@pytest.fixture
def data(tmp_path):
    """A small data set under the name of a large one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator)
    frame = pd.DataFrame(x.numpy(), columns=list("abcdef"))
    frame["resistance"] = (2 * x[:, 0] - x[:, 1].relu() + 20).numpy()
    (tmp_path / "uci").mkdir()
    frame.to_csv(tmp_path / "uci" / "yacht.csv", index=False)
    splits = {"test_indices": [list(range(i, 60, 20)) for i in range(20)]}
    (tmp_path / "uci" / "yacht.splits.json").write_text(json.dumps(splits))
    return tmp_path


def run(data, *options):
    command = [sys.executable, PAPER, "--data-dir", data, "--output", data / "results.csv"]
    slice_of_it = ["--datasets", "yacht", "--seeds", "0", "--methods", "snr", "--jobs", "1"]
    command += [*slice_of_it, "--epochs", "0.02", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return pd.read_csv(data / "results.csv"), done.stdout


def test_a_slice_runs_and_goes_on(data):
    options = "--estimators", "moments", "--splits", "3"
    table, _ = run(data, *options, "--experiments", "splits")
    assert set(table.columns) >= COLUMNS
    assert set(table.method) == {"unpruned", "bmr"}
    assert (table.split == 3).all()
    assert table[["rmse", "test_log_likelihood", "free_energy", "seconds"]].notna().all(axis=None)
    assert ((table.complexity - table.accuracy - table.free_energy).abs() < 1e-3).all()
    after, output = run(data, *options, "--experiments", "one-shot", "splits")
    assert "yacht moments seed 0 \n" in output
    assert "split 3" not in output
    pd.testing.assert_frame_equal(
        after[after.experiment == "splits"].reset_index(drop=True), table, check_dtype=False
    )
    curve = after[(after.experiment == "one-shot") & (after.method == "bmr")]
    assert len(curve) == 99
    assert curve.pruned.is_monotonic_increasing
    start = after[(after.experiment == "one-shot") & (after.method == "unpruned")]
    realised = curve.free_energy - start.free_energy.item()
    assert (realised - curve.realised_delta_f).abs().max() < 0.01
    # Pruned weights leave the prior and the posterior, and ΔF is the sum of what they cost.
    assert curve.complexity.is_monotonic_decreasing
    assert set(after.method) == {"unpruned", "bmr", "snr"}


def test_the_problems_are_those_of_the_paper(modules, data):
    problems = modules["problems"]
    problem = problems.load_problem("yacht", None, data)
    assert problem.x.shape == (60, 6)
    torch.testing.assert_close(problem.x.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    assert 15 < problem.y.mean() < 25, "targets are as they are"
    split = problems.load_problem("yacht", 3, data)
    assert (len(split.x), len(split.test_x)) == (57, 3)
    torch.testing.assert_close(split.y.std(0, correction=0), torch.ones(1))
    back = split.y * split.unit
    torch.testing.assert_close(back.std(0), problem.y[split_rows(3)].std(0))
    assert problems.settings_of("naval") == problems.Settings(750, 150, 64, 1e-3)
    assert problems.settings_of("sine") == problems.Settings(3000, 600, 16, 1e-3)
    with pytest.raises(ValueError, match="split"):
        problems.load_problem("sine", 0, None)
    sine = problems.load_problem("sine", None, None)
    assert sine.x.shape == (792, 8)
    assert torch.equal(sine.y[:-8], sine.x[8:, 0])


def split_rows(split):
    return [row for row in range(60) if row % 20 != split]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_pages_quote_the_results(modules, page):
    report, tables = modules["report"], modules["tables"]
    text = (ROOT / page).read_text()
    results = tables.read_results(PAPER / "results.csv")
    assert report.filled(text, results, tables.read_published(PAPER / "published.csv")) == text
