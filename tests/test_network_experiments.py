"""The command of the experiments with networks, on a slice: it runs, and goes on after a kill."""

import gzip
import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
NETWORKS = ROOT / "benchmarks" / "networks"
SLICE = ["--networks", "lenet-300-100", "--seeds", "0", "--rounds", "1"]
SLICE += ["--epochs", "0.1", "--draws", "10"]
MEASURED = ["seconds", "predictive_ms", "dense_predictive_ms"]


def write_idx(path, array):
    sizes = np.array(array.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits of scikit-learn in the size of MNIST, and files of noise in the format of CIFAR-10."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    (folder / "cifar10").mkdir()
    images, classes = load_digits(return_X_y=True)
    large = np.pad(images.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    for name, rows in {"train": slice(1000), "t10k": slice(1000, 1400)}.items():
        write_idx(folder / f"mnist/{name}-images-idx3-ubyte.gz", 15.9 * large[rows])
        write_idx(folder / f"mnist/{name}-labels-idx1-ubyte.gz", classes[rows])
    noise = np.random.default_rng(0).integers(0, 256, (100, 3073), dtype=np.uint8)
    noise[:, 0] %= 10
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / f"cifar10/{name}.bin").write_bytes(noise.tobytes())
    return folder


def start(data, work, *methods):
    options = ["--data-dir", data, "--output", work / "results.csv", "--work", work, *SLICE]
    command = [sys.executable, NETWORKS, *options, "--methods", *methods]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing has stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, start(data, folder, "bmr", "magnitude").communicate()[0]


def test_a_slice_runs(data, whole):
    folder, output = whole
    table = pd.read_csv(folder / "results.csv")
    ours = table[table.method == "bmr"]
    assert ours.epochs.tolist() == [4, 6]
    assert ours.compression.is_monotonic_increasing and ours.compression.iloc[-1] > 1
    assert ours.error.iloc[0] < 50 and ours.free_energy.notna().all()
    assert table.method.tolist() == ["bmr"] * 2 + ["magnitude"]
    assert output.count("method=bmr") == 2
    with np.load(folder / "first-layer-lenet-300-100.npz") as file:
        assert file["weights"].shape[1] == 784
    output, _ = start(data, folder, "bmr", "magnitude").communicate()
    assert not output, "everything is there"


@pytest.mark.rare
@pytest.mark.parametrize(
    ("method", "trained"),
    [pytest.param("bmr", "round-0.seconds", marks=pytest.mark.rare), ("magnitude", "round-1.pt")],
)
def test_a_killed_run_goes_on(data, tmp_path, whole, method, trained):
    run = start(data, tmp_path, method)
    while not (tmp_path / f"lenet-300-100-{method}-0" / trained).exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "results.csv").exists()
    start(data, tmp_path, method).communicate()
    found, expected = (pd.read_csv(folder / "results.csv") for folder in (tmp_path, whole[0]))
    expected = expected[expected.method == method].reset_index(drop=True)
    expected = expected.drop(columns=MEASURED)
    pd.testing.assert_frame_equal(found.drop(columns=MEASURED), expected, check_dtype=False)


@pytest.fixture
def report():
    """The module that fills the pages; other experiments have modules of such names."""
    names = ("figures", "report", "tables")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(NETWORKS))
    yield importlib.import_module("report")
    sys.path.remove(str(NETWORKS))
    for name in names:
        del sys.modules[name]
    sys.modules.update(others)


def test_the_pages_quote_the_results(report):
    sources = report.read_sources(NETWORKS)
    for page in report.PAGES:
        assert report.filled(page.read_text(), sources) == page.read_text()


def test_curves_are_compared_at_one_compression(report):
    """Between two networks of a curve by the logarithm of the compression; not beyond its end."""
    rows = [("x", 0, 1.0, 1.0, 0.1, 0.01), ("x", 0, 100.0, 3.0, 0.3, 0.03)]
    columns = ["method", "seed", "compression", "error", "nll", "ece"]
    results = pd.DataFrame(rows, columns=columns)
    found = report.tables.at_compression(results, 10.0)
    assert found.tolist() == pytest.approx([2.0, 0.2, 0.02])
    assert report.tables.at_compression(results, 101.0) is None
    assert report.tables.at_compression(results[:0], 10.0) is None
