"""Regression data and images: from scikit-learn, from a directory, or from OpenML."""

from __future__ import annotations

import gzip
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_path, show
from pyro_bmr.extras import import_extra

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ImageData", "RegressionData", "load", "load_cifar10", "load_mnist", "load_splits"]

# Columns to predict, in the CSV files; all others are inputs.
TARGETS = {
    "boston": ("medv",),
    "concrete": ("compressive_strength",),
    "energy": ("heating_load", "cooling_load"),
    "kin8nm": ("y",),
    "naval": ("compressor", "turbine"),
    "powerplant": ("pe",),
    "wine": ("quality",),
    "yacht": ("resistance",),
}

# Numbers of data sets on https://www.openml.org with the rows and columns of the files.
_OPENML = {"boston": 531, "mnist": 554, "cifar10": 40927}

_MNIST = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

# Files of CIFAR-10, those to train with and that to test, and where the archive unpacks them.
_CIFAR10 = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR10_FOLDERS = ("cifar10/cifar-10-batches-bin", "cifar-10-batches-bin")


@dataclass(frozen=True)
class RegressionData:
    """Inputs and targets of a regression problem, as they are, not standardised.

    Parameters
    ----------
    name : str
        What it is called.
    x : Tensor
        Inputs, of shape ``(rows, inputs)``.
    y : Tensor
        Targets, of shape ``(rows, outputs)``.
    inputs : tuple of str
        Names of the inputs.

    Examples
    --------
    >>> RegressionData("line", torch.ones(2, 1), torch.ones(2, 1), ("x",)).inputs
    ('x',)
    """

    name: str
    x: Tensor
    y: Tensor
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class ImageData:
    """Images and their classes.

    Parameters
    ----------
    name : str
        What it is called.
    x, x_test : Tensor
        Images, of shape ``(images, channels, height, width)``, between 0 and 1; one channel if
        they are grey, red, green and blue if they are in colour.
    y, y_test : Tensor
        Classes, int64.

    Examples
    --------
    >>> x, y = torch.zeros(2, 1, 28, 28), torch.tensor([3, 8])
    >>> ImageData("two digits", x, y, x, y).y
    tensor([3, 8])
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(name: str, directory: str | Path | None = None) -> RegressionData:
    """Load a data set by name.

    Parameters
    ----------
    name : str
        ``diabetes``, which comes with scikit-learn, or one of the UCI sets: boston, concrete,
        energy, kin8nm, naval, powerplant, wine, yacht.
    directory : str or Path, optional
        Where ``uci/NAME.csv`` lies; the environment variable ``PYRO_BMR_DATA`` otherwise. Without
        either the set is downloaded from OpenML and cached by scikit-learn.

    Returns
    -------
    RegressionData
        In float32.

    Raises
    ------
    ValueError
        If the name is not known, or OpenML does not have the set and no directory is given.
    ConnectionError
        If the download fails.
    FileNotFoundError
        If the directory does not hold the file.

    Examples
    --------
    >>> load("diabetes").x.shape
    torch.Size([442, 10])
    """
    import pandas as pd

    _check_name(name, ["diabetes", *TARGETS])
    if name == "diabetes":
        return _data(name, _sklearn().load_diabetes(as_frame=True).frame, ("target",))
    directory = _choose(directory)
    if directory is None:
        return _data(name, _download(name), TARGETS[name])
    return _data(name, pd.read_csv(_find(directory, f"uci/{name}.csv")), TARGETS[name])


def load_splits(name: str, directory: str | Path | None = None) -> list[Tensor]:
    """Load the 20 standard splits of a UCI set into training and test rows.

    Parameters
    ----------
    name : str
        One of the UCI sets.
    directory : str or Path, optional
        Where ``uci/NAME.splits.json`` lies; the environment variable ``PYRO_BMR_DATA`` otherwise.

    Returns
    -------
    list of Tensor
        For each split, the numbers of the test rows; all others are for training.

    Raises
    ------
    ValueError
        If there is no directory.
    FileNotFoundError
        If the directory does not hold the file.

    References
    ----------
    Hernández-Lobato & Adams (2015), "Probabilistic backpropagation for scalable learning of
    Bayesian neural networks", arXiv:1502.05336, who made them.
    """
    _check_name(name, [*TARGETS])
    directory = _choose(directory)
    if directory is None:
        msg = (
            f"the splits of {name} are not downloaded. Expected directory= or the environment "
            f"variable PYRO_BMR_DATA to name a directory with uci/{name}.splits.json"
        )
        raise ValueError(msg)
    content = json.loads(_find(directory, f"uci/{name}.splits.json").read_text())
    return [torch.tensor(rows, device="cpu") for rows in content["test_indices"]]


def load_mnist(directory: str | Path | None = None) -> ImageData:
    """Load MNIST: 60,000 handwritten digits to train with, 10,000 to test.

    Parameters
    ----------
    directory : str or Path, optional
        Where the four files ``mnist/*-ubyte.gz`` lie; the environment variable ``PYRO_BMR_DATA``
        otherwise. Without either they are downloaded from OpenML and cached by scikit-learn.

    Returns
    -------
    ImageData
        In float32.

    Raises
    ------
    FileNotFoundError
        If the directory does not hold a file.
    ConnectionError
        If the download fails.
    ValueError
        If a file does not hold what its header says.

    References
    ----------
    LeCun, Cortes & Burges, "The MNIST database of handwritten digits", who describe the files.

    Examples
    --------
    >>> load_mnist("/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: /nowhere/mnist/train-images-idx3-ubyte.gz does not exist. ...
    """
    directory = _choose(directory)
    if directory is None:
        parts = _download_images("mnist", 60_000)
    else:
        parts = [_read_idx(_find(directory, f"mnist/{name}-ubyte.gz")) for name in _MNIST]
    return _images("mnist", (1, 28, 28), *parts)


def load_cifar10(directory: str | Path | None = None) -> ImageData:
    """Load CIFAR-10: 50,000 small photographs in colour to train with, 10,000 to test.

    The classes are airplane, automobile, bird, cat, deer, dog, frog, horse, ship and truck, from
    0 to 9.

    Parameters
    ----------
    directory : str or Path, optional
        Where ``cifar10/`` holds the files of the binary version, ``data_batch_1.bin`` to
        ``data_batch_5.bin`` and ``test_batch.bin``, or where the archive was unpacked, to
        ``cifar-10-batches-bin/`` or ``cifar10/cifar-10-batches-bin/``; the environment variable
        ``PYRO_BMR_DATA`` otherwise. Without either they are downloaded from OpenML, where the
        first 50,000 rows are to train with, and cached by scikit-learn.

    Returns
    -------
    ImageData
        In float32, of shape ``(images, 3, 32, 32)``.

    Raises
    ------
    FileNotFoundError
        If the directory does not hold a file.
    ConnectionError
        If the download fails.
    ValueError
        If a file does not hold whole records of a class and an image, as one that is cut off.

    References
    ----------
    Krizhevsky (2009), "Learning multiple layers of features from tiny images", and
    https://www.cs.toronto.edu/~kriz/cifar.html, which describes the files.

    Examples
    --------
    >>> load_cifar10("/nowhere")
    Traceback (most recent call last):
    FileNotFoundError: /nowhere/cifar10/data_batch_1.bin does not exist. ...
    """
    directory = _choose(directory)
    if directory is None:
        return _images("cifar10", (3, 32, 32), *_download_images("cifar10", 50_000))
    unpacked = [folder for folder in _CIFAR10_FOLDERS if (Path(directory) / folder).is_dir()]
    folder = (*unpacked, "cifar10")[0]
    *train, test = [_read_records(_find(directory, f"{folder}/{name}")) for name in _CIFAR10]
    records = torch.cat(train)
    parts = records[:, 1:], records[:, 0], test[:, 1:], test[:, 0]
    return _images("cifar10", (3, 32, 32), *parts)


def _images(
    name: str, shape: tuple[int, ...], x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor
) -> ImageData:
    """Give images of bytes their shape, between 0 and 1."""
    x, x_test = (pixels.reshape(-1, *shape).float().div_(255) for pixels in (x, x_test))
    return ImageData(name, x, y.long(), x_test, y_test.long())


def _download_images(name: str, rows: int) -> list[Tensor]:
    """Pixels and classes of the first rows, to train with, and of the others, to test."""
    pixels, target = _fetch(name, f"{name}/", return_X_y=True, as_frame=False)
    x = torch.tensor(pixels, dtype=torch.uint8, device="cpu")
    y = torch.tensor(target.astype("int64"), device="cpu")
    return [x[:rows], y[:rows], x[rows:], y[rows:]]


def _read_records(path: Path) -> Tensor:
    """Read records of CIFAR-10: a byte for the class, 1,024 each for red, green and blue."""
    content = np.fromfile(path, np.uint8)
    records = content[: len(content) // 3073 * 3073].reshape(-1, 3073)
    largest = records[:, 0].max(initial=0)
    if not len(content) or len(records) * 3073 != len(content) or largest > 9:
        msg = (
            f"{path} has {len(content)} bytes, {len(records)} whole records, the largest class "
            f"{largest}. Expected records of 3073 bytes, a class from 0 to 9 and an image, as in "
            "the binary version of CIFAR-10"
        )
        raise ValueError(msg)
    return torch.from_numpy(records)


def _read_idx(path: Path) -> Tensor:
    """Read an array of bytes: two zeros, the type (8), the number of axes, their sizes, data."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], ">i4").tolist()
    if not axes or len(content) - start != math.prod(shape):
        msg = (
            f"{path} has {len(content)} bytes that are not an array of bytes in IDX format. "
            "Expected the file of the MNIST database as it is published"
        )
        raise ValueError(msg)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


def _check_name(name: str, known: list[str]) -> None:
    if not (isinstance(name, str) and name in known):
        msg = f"got the data set {show(name)}. Expected one of {known}"
        raise ValueError(msg)


def _choose(directory: str | Path | None) -> str | Path | None:
    if directory is None:
        return os.environ.get("PYRO_BMR_DATA") or None
    check_path(directory, "directory")
    return directory


def _find(directory: str | Path, name: str) -> Path:
    path = Path(directory) / name
    if not path.is_file():
        msg = f"{path} does not exist. Expected a directory that holds {name}"
        raise FileNotFoundError(msg)
    return path


def _download(name: str) -> pd.DataFrame:
    if name not in _OPENML:
        msg = (
            f"{name} is not downloaded automatically. Expected directory= or the environment "
            f"variable PYRO_BMR_DATA to name a directory with uci/{name}.csv"
        )
        raise ValueError(msg)
    return _fetch(name, f"uci/{name}.csv", as_frame=True).frame.rename(columns=str.lower)


def _fetch(name: str, path: str, **options: Any) -> Any:
    try:
        return _sklearn().fetch_openml(data_id=_OPENML[name], **options)
    except OSError as error:
        msg = (
            f"{name} could not be downloaded from OpenML ({error}). Expected a connection, or "
            "directory= or the environment variable PYRO_BMR_DATA to name a directory with "
            f"{path}"
        )
        raise ConnectionError(msg) from error


def _sklearn() -> Any:
    return import_extra("sklearn.datasets", "scikit-learn", "sklearn", "these data")


def _data(name: str, frame: pd.DataFrame, targets: tuple[str, ...]) -> RegressionData:
    inputs = frame.drop(columns=list(targets)).astype("float32")
    return RegressionData(
        name,
        torch.tensor(inputs.to_numpy(), device="cpu"),
        torch.tensor(frame[list(targets)].astype("float32").to_numpy(), device="cpu"),
        tuple(inputs.columns),
    )


def __dir__() -> list[str]:
    return __all__
