"""Regression data: what comes with scikit-learn, and the UCI sets from a directory or OpenML."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from sklearn import datasets
from torch import Tensor

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

# Numbers of data sets on https://www.openml.org with the rows and columns of the CSV files.
_OPENML = {"boston": 531}


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
        If the name is not known, or the set cannot be downloaded and no directory is given.
    FileNotFoundError
        If the directory does not hold the file.

    Examples
    --------
    >>> load("diabetes").x.shape
    torch.Size([442, 10])
    """
    if name == "diabetes":
        return _data(name, datasets.load_diabetes(as_frame=True).frame, ("target",))
    if name not in TARGETS:
        msg = f"got the data set {name!r}. Expected one of {['diabetes', *TARGETS]}"
        raise ValueError(msg)
    directory = directory or os.environ.get("PYRO_BMR_DATA")
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
    directory = directory or os.environ.get("PYRO_BMR_DATA")
    if directory is None:
        msg = (
            f"the splits of {name} are not downloaded. Expected directory= or the environment "
            f"variable PYRO_BMR_DATA to name a directory with uci/{name}.splits.json"
        )
        raise ValueError(msg)
    content = json.loads(_find(directory, f"uci/{name}.splits.json").read_text())
    return [torch.tensor(rows) for rows in content["test_indices"]]


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
    frame = datasets.fetch_openml(data_id=_OPENML[name], as_frame=True).frame
    return frame.rename(columns=str.lower)


def _data(name: str, frame: pd.DataFrame, targets: tuple[str, ...]) -> RegressionData:
    inputs = frame.drop(columns=list(targets)).astype("float32")
    return RegressionData(
        name,
        torch.tensor(inputs.to_numpy()),
        torch.tensor(frame[list(targets)].astype("float32").to_numpy()),
        tuple(inputs.columns),
    )
