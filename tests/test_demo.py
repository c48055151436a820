"""The demo from end to end, the data that it takes, and every block of code in the README."""

import ast
import gzip
import importlib
import os
import re
import subprocess
import sys
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
    assert "diabetes: 354 rows to train on, 88 to test on" in output
    assert "a 10-50-1 ReLU network" in output
    assert max(map(len, output.splitlines())) <= 80
    for part in (
        "fc1.weight",
        "ΔF",
        "pruned",
        "trained",
        "reduced",
        "refitted",
        "predicted",
        "test RMSE",
        "±",
        "not reduced",
    ):
        assert part in output


@pytest.mark.rare
@needs_uci
def test_the_demo_on_boston(capsys, tmp_path):
    output = run_demo(capsys, tmp_path, "--data", "boston", "--data-dir", str(SHARED))
    assert "boston: 405 rows to train on, 101 to test on" in output
    assert "a 13-50-1 ReLU network" in output


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
    monkeypatch.setattr(sklearn_datasets, "fetch_openml", fetch)
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
    monkeypatch.setattr(sklearn_datasets, "fetch_openml", fetch)
    downloaded = datasets.load_mnist()
    assert torch.equal(downloaded.x, data.x) and torch.equal(downloaded.y_test, data.y_test)


def test_an_mnist_file_that_is_cut_off(tmp_path):
    (tmp_path / "mnist").mkdir()
    with gzip.open(tmp_path / "mnist/train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2]))
    with pytest.raises(ValueError, match="has 10 bytes that are not an array of bytes in IDX"):
        datasets.load_mnist(tmp_path)


def write_cifar10(folder, images):
    """Write files that hold equally many images each, with random pixels; return the records."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    records = torch.randint(256, (6, images, 3073), dtype=torch.uint8, generator=generator)
    records[..., 0] %= 10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, file in zip(names, records, strict=True):
        (folder / f"{name}.bin").write_bytes(file.numpy().tobytes())
    return records


@pytest.mark.parametrize(
    "folder", ["cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"]
)
def test_cifar10(folder, tmp_path, monkeypatch):
    """Of a pixel, the byte has its place by channel, row and column."""
    records = write_cifar10(tmp_path / folder, 3)
    monkeypatch.setenv("PYRO_BMR_DATA", str(tmp_path))
    data = datasets.load_cifar10()
    assert data.name == "cifar10" and data.x.dtype == torch.float32 and data.y.dtype == torch.int64
    assert data.x.shape == (15, 3, 32, 32) and data.x_test.shape == (3, 3, 32, 32)
    assert data.y.tolist() == records[:5, :, 0].flatten().tolist()
    assert data.y_test.tolist() == records[5, :, 0].tolist()
    for channel, row, column in [(0, 0, 0), (0, 0, 5), (1, 7, 3), (2, 31, 31)]:
        byte = 1 + 1024 * channel + 32 * row + column
        assert data.x[4, channel, row, column] == records[1, 1, byte] / 255
        assert data.x_test[2, channel, row, column] == records[5, 2, byte] / 255


def test_cifar10_from_openml(monkeypatch):
    """OpenML has the training rows first, pixels as floats, and classes as strings."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.zeros(50_002, 3072, dtype=torch.uint8)
    pixels[[0, 50_001]] = torch.randint(256, (2, 3072), dtype=torch.uint8, generator=generator)
    target = (torch.arange(50_002) % 10).numpy().astype(str).astype(object)
    called = {}

    def fetch(**options):
        called.update(options)
        return pixels.float().numpy(), target

    monkeypatch.delenv("PYRO_BMR_DATA", raising=False)
    monkeypatch.setattr(sklearn_datasets, "fetch_openml", fetch)
    data = datasets.load_cifar10()
    assert called["data_id"] == 40927
    assert data.x.shape == (50_000, 3, 32, 32) and data.x_test.shape == (2, 3, 32, 32)
    assert data.y.bincount().tolist() == [5000] * 10 and data.y_test.tolist() == [0, 1]
    assert data.x[0, 2, 4, 1] == pixels[0, 2 * 1024 + 4 * 32 + 1] / 255
    assert data.x_test[1, 1, 30, 2] == pixels[50_001, 1024 + 30 * 32 + 2] / 255


@pytest.mark.skipif(
    not list(SHARED.glob("cifar*/**/test_batch.bin")),
    reason="no CIFAR-10; set PYRO_BMR_DATA to a directory that has it",
)
def test_the_files_of_cifar10():
    """Every class is equally frequent, and the mean colour is that which is known."""
    data = datasets.load_cifar10(SHARED)
    assert data.y.bincount().tolist() == [5000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    assert data.x.aminmax() == (0.0, 1.0)
    known = torch.tensor([0.4914, 0.4822, 0.4465])
    assert data.x.mean((0, 2, 3)).allclose(known, atol=1e-3)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has 0 bytes, 0 whole records"),
        (bytes(3073 + 10), "has 3083 bytes, 1 whole records"),
        (
            bytes(3073) + b"\x0a" + bytes(3072),
            "has 6146 bytes, 2 whole records, the largest class 10",
        ),
    ],
)
def test_a_cifar10_file_that_is_wrong(content, told, tmp_path):
    write_cifar10(tmp_path / "cifar10", 1)
    (tmp_path / "cifar10/data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.bin {told}.*Expected records of 3073"):
        datasets.load_cifar10(tmp_path)


def test_a_cifar10_file_that_is_missing(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-bin", 1)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin/test_batch.bin does not"):
        datasets.load_cifar10(tmp_path)


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
    assert len(outputs) == 5
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


@pytest.mark.rare
def test_the_benchmark_of_the_makefile_can_be_collected():
    path = re.search(r"pytest (\S+) --benchmark-only", (ROOT / "Makefile").read_text())[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", path, "--collect-only", "-q"],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_one_name_one_class():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "pyro_bmr").rglob("*.py")]
    classes = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    public = [name for name in classes if not name.startswith("_")]
    assert sorted(public) == sorted(set(public))
