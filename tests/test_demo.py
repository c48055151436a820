"""The demo from end to end, the data that it takes, and every block of code in the README."""

import ast
import gzip
import importlib
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from markdown import ROOT, check_same, run_blocks
from sklearn import datasets as sklearn_datasets

from pyro_bmr import datasets
from pyro_bmr.__main__ import main

SHARED = Path(os.environ.get("PYRO_BMR_DATA", ROOT.parent / "shared" / "data"))
needs_uci = pytest.mark.skipif(
    not (SHARED / "uci").is_dir(), reason="no UCI data; set PYRO_BMR_DATA to their directory"
)


def run_demo(capsys, tmp_path, *options):
    figure = tmp_path / "figures" / "demo.png"
    main(["demo", "--epochs", "4", "--figure", str(figure), *options])
    assert figure.read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out


def test_the_demo(capsys, tmp_path):
    output = run_demo(capsys, tmp_path)
    assert "diabetes: 354 training and 88 test rows; a 10-50-1 ReLU network" in output
    for part in (
        "fc1.weight",
        "ΔF",
        "pruned",
        "before",
        "reduced",
        "refitted",
        "predicted",
        "test RMSE",
        "±",
        "not reduced",
    ):
        assert part in output


@needs_uci
def test_the_demo_on_boston(capsys, tmp_path):
    output = run_demo(capsys, tmp_path, "--data", "boston", "--data-dir", str(SHARED))
    assert "boston: 405 training and 101 test rows; a 13-50-1 ReLU network" in output


@needs_uci
@pytest.mark.parametrize("name", datasets.TARGETS)
def test_uci_data(name, monkeypatch):
    monkeypatch.setenv("PYRO_BMR_DATA", str(SHARED))
    data = datasets.load(name)
    rows = len(pd.read_csv(SHARED / "uci" / f"{name}.csv"))
    assert data.x.shape == (rows, len(data.inputs))
    assert data.y.shape == (rows, len(datasets.TARGETS[name]))
    assert data.x.isfinite().all() and data.y.isfinite().all()
    assert not set(data.inputs) & set(datasets.TARGETS[name])


def test_data_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got the data set 'iris'. Expected one of"):
        datasets.load("iris")
    with pytest.raises(FileNotFoundError, match=r"boston.csv does not exist. Expected a directory"):
        datasets.load("boston", tmp_path)
    monkeypatch.delenv("PYRO_BMR_DATA", raising=False)
    with pytest.raises(ValueError, match="wine is not downloaded.*PYRO_BMR_DATA"):
        datasets.load("wine")


def test_boston_from_openml(monkeypatch):
    """OpenML names the columns in capitals, and has CHAS and RAD as categories of strings."""
    frame = pd.DataFrame({"CRIM": [0.1, 0.2], "CHAS": ["0", "1"], "MEDV": [24.0, 21.6]})
    frame["CHAS"] = frame["CHAS"].astype("category")
    called = {}

    def fetch(**options):
        called.update(options)
        return sklearn_datasets._base.Bunch(frame=frame)

    monkeypatch.delenv("PYRO_BMR_DATA", raising=False)
    monkeypatch.setattr(datasets.datasets, "fetch_openml", fetch)
    data = datasets.load("boston")
    assert called["data_id"] == 531
    assert data.inputs == ("crim", "chas")
    assert torch.equal(data.x, torch.tensor([[0.1, 0.0], [0.2, 1.0]]))
    assert torch.equal(data.y, torch.tensor([[24.0], [21.6]]))


@needs_uci
def test_mnist(monkeypatch):
    """The counts of the digits are those that the database is known by."""
    data = datasets.load_mnist(SHARED)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.y.bincount().tolist() == counts
    assert data.y_test.bincount()[:2].tolist() == [980, 1135]
    assert data.x.shape == (60_000, 1, 28, 28) and data.x_test.shape == (10_000, 1, 28, 28)
    assert data.x.aminmax() == (0.0, 1.0)

    def fetch(**_options):
        pixels = torch.cat([data.x, data.x_test]).flatten(1).mul(255).round().numpy()
        return pixels, torch.cat([data.y, data.y_test]).numpy().astype(str).astype(object)

    monkeypatch.delenv("PYRO_BMR_DATA", raising=False)
    monkeypatch.setattr(datasets.datasets, "fetch_openml", fetch)
    downloaded = datasets.load_mnist()
    assert torch.equal(downloaded.x, data.x) and torch.equal(downloaded.y_test, data.y_test)


def test_an_mnist_file_that_is_cut_off(tmp_path):
    (tmp_path / "mnist").mkdir()
    with gzip.open(tmp_path / "mnist/train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2]))
    with pytest.raises(ValueError, match="has 10 bytes that are not an array of bytes in IDX"):
        datasets.load_mnist(tmp_path)


def test_splits_come_from_a_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("PYRO_BMR_DATA", raising=False)
    with pytest.raises(ValueError, match="directory="):
        datasets.load_splits("wine")
    with pytest.raises(FileNotFoundError, match="wine.splits.json"):
        datasets.load_splits("wine", tmp_path)
    (tmp_path / "uci").mkdir()
    (tmp_path / "uci" / "wine.splits.json").write_text('{"test_indices": [[0, 2], [1]]}')
    splits = datasets.load_splits("wine", tmp_path)
    assert [rows.tolist() for rows in splits] == [[0, 2], [1]]


def test_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, outputs = run_blocks(ROOT / "README.md")
    assert len(outputs) == 4
    for printed, shown in outputs:
        check_same(printed, shown)
    result = namespace["result"]
    assert result.masks["w"].nonzero().flatten().tolist() == [0, 3]
    assert namespace["draws"]["y"].shape == (100, 200)
    assert namespace["data"].posterior["w"].shape == (1, 1000, 10)
    assert namespace["predict"](namespace["x"]).shape == (200,)


def test_the_guide_quotes_the_benchmark_on_mnist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    mnist = importlib.import_module("mnist")
    table = pd.read_csv(mnist.RESULTS, index_col="network")
    assert mnist.fill(mnist.PAGE.read_text(), table) == mnist.PAGE.read_text()
    whole, units = table.loc["whole"], table.loc["units, compacted"]
    faster = whole["predictive (ms)"] / units["predictive (ms)"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"predicts [{faster:.1f} times as fast]" in readme
    assert f"with {units['accuracy']:.2%} of the test".replace("%", " %") in readme


def speed_table():
    table = pd.read_csv(ROOT / "benchmarks" / "training.csv", index_col=["network", "quantity"])
    lines = [
        "| network, batch | `fit` | NumPyro, `lax.scan` | torch, eager | Pyro, `SVI.step` "
        "| Pyro / `fit` | NumPyro / `fit` | compiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, batch in (("13-50-1", 16), ("784-300-100-10", 128)):
        row = table.loc[network, "median"]
        times = (
            f"{row[f'{way}, ms a step']:.2f} ms" for way in ("fit", "numpyro", "torch", "pyro")
        )
        lines.append(
            f"| {network}, {batch} | {' | '.join(times)} | {row['pyro / fit']:.1f} "
            f"| {1 / row['fit / numpyro']:.1f} | {row['compile, s']:.0f} s |"
        )
    return "\n".join(lines)


def test_the_guide_quotes_the_measured_speed():
    assert speed_table() in (ROOT / "docs" / "guide" / "training.md").read_text()


def test_the_map_names_every_module():
    package = ROOT / "pyro_bmr"
    modules = {path for path in package.rglob("*.py") if path.stem != "__init__"}
    folders = {path.parent for path in modules} - {package}
    _, where = (ROOT / "CONTRIBUTING.md").read_text().split("## Where is what")
    named = set(re.findall(r"`(\w+)`", where)) - {"pyro_bmr", "reduce"}
    assert named == {path.stem for path in modules | folders}


def test_one_name_one_class():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "pyro_bmr").rglob("*.py")]
    classes = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    public = [name for name in classes if not name.startswith("_")]
    assert sorted(public) == sorted(set(public))
