"""The experiments of the paper: a small slice of them, and that the pages quote their results."""

import importlib
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
def command(modules):
    """What the command line is made of."""
    spec = importlib.util.spec_from_file_location("paper", PAPER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


SLICE = ["--datasets", "yacht", "--estimators", "moments", "--seeds", "0", "--splits", "3"]
SLICE += ["--methods", "bmr", "snr", "--epochs", "0.02", "--jobs", "1"]


@pytest.mark.rare
def test_a_slice_runs_and_goes_on(data, command, monkeypatch, capsys):
    """First in processes of its own, then in this one."""
    results = data / "results.csv"
    options = [str(PAPER), "--data-dir", str(data), "--output", str(results), *SLICE]
    first = [sys.executable, *options, "--experiments", "one-shot"]
    output = subprocess.run(first, capture_output=True, text=True, check=True).stdout
    curves = pd.read_csv(results)
    assert "yacht moments seed 0 \n" in output
    assert set(curves.columns) >= COLUMNS
    curve = curves[curves.method == "bmr"]
    assert len(curve) == 99
    assert curve.pruned.is_monotonic_increasing
    start = curves[curves.method == "unpruned"].free_energy.item()
    assert (curve.free_energy - start - curve.realised_delta_f).abs().max() < 0.01
    # Pruned weights leave the prior and the posterior.
    assert curve.complexity.is_monotonic_decreasing
    assert set(curves.method) == {"unpruned", "bmr", "snr"}

    monkeypatch.setattr(sys, "argv", [*options, "--experiments", "one-shot", "splits"])
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    command.main()
    output, table = capsys.readouterr().out, pd.read_csv(results)
    assert "yacht moments seed 0 split 3" in output
    assert "seed 0 \n" not in output
    pd.testing.assert_frame_equal(
        table[table.experiment == "one-shot"].reset_index(drop=True), curves, check_dtype=False
    )
    split = table[table.experiment == "splits"]
    assert set(split.method) == {"unpruned", "bmr"}
    assert split[["rmse", "test_log_likelihood", "seconds"]].notna().all(axis=None)
    assert ((table.complexity - table.accuracy - table.free_energy).abs() < 1e-3).all()


def test_rows_of_a_network_that_came_out_otherwise_go(command, tmp_path):
    path = tmp_path / "results.csv"
    cell = command.Cell("yacht", "local", 0, None, ("bmr",), ("bmr",))

    def rows(free_energy, *methods):
        return [
            {"dataset": "yacht", "estimator": "local", "seed": 0, "split": None}
            | {"experiment": "iterative", "method": method, "free_energy": free_energy}
            for method in methods
        ]

    command._add(path, cell, rows(5.0, "unpruned", "bmr"))
    command._add(path, cell, rows(5.0, "unpruned", "snr"))
    assert set(command._read(path).method) == {"unpruned", "bmr", "snr"}
    wanted = replace(cell, curves=(), loops=("bmr", "snr", "spr"))
    (remaining,) = command._remaining([wanted], command._read(path))
    assert remaining.loops == ("bmr", "spr")
    command._add(path, cell, rows(6.0, "unpruned", "spr"))
    assert set(command._read(path).method) == {"unpruned", "spr"}


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
    report = modules["report"]
    text = (ROOT / page).read_text()
    assert report.filled(text, report.read_sources()) == text
