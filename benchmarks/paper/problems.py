"""What is learned: the data sets, the networks and the settings of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_mean
from recurrent import Recurrent, sequences, signal
from torch import Tensor, nn

import pyro_bmr as bmr
from pyro_bmr import datasets
from pyro_bmr.demo import Standardization

REGRESSION = ("boston", "concrete", "energy", "kin8nm", "naval", "powerplant", "wine", "yacht")
SIGNALS = ("sine", "sawtooth", "square")


@dataclass(frozen=True)
class Settings:
    """How a network is trained: by Adam at a constant learning rate."""

    num_epochs: int
    refit_epochs: int
    batch_size: int
    lr: float

    def shortened(self, part: float) -> Settings:
        """Return the same with a part of the epochs, but one at least."""
        epochs = (max(1, round(part * n)) for n in (self.num_epochs, self.refit_epochs))
        return Settings(*epochs, self.batch_size, self.lr)


@dataclass(frozen=True)
class Problem:
    """A data set and the network that learns it.

    The inputs are standardised; ``unit`` is what a target of 1 stands for, one per output.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    unit: Tensor
    make_model: Callable[[int], Callable[..., Any]]
    num_parameters: Callable[[int], int]
    hidden: int
    settings: Settings


def settings_of(dataset: str) -> Settings:
    """Return the settings of the paper's experiments.

    Returns
    -------
    Settings
        Of Beckers et al. (2022), sec. V.
    """
    if dataset in SIGNALS:
        return Settings(num_epochs=3000, refit_epochs=600, batch_size=16, lr=1e-3)
    batch_size = {"concrete": 32, "wine": 32, "kin8nm": 64, "naval": 64, "powerplant": 64}
    return Settings(
        num_epochs=750,
        refit_epochs=150,
        batch_size=batch_size.get(dataset, 16),
        lr=1e-3 if dataset == "naval" else 1e-2,
    )


def load_problem(
    dataset: str, split: int | None, directory: Path | None, epochs: float = 1.0
) -> Problem:
    """Load a data set, all of it or a training set and its test set.

    Targets are as they are where all rows are used, as in the paper, and standardised by the
    training rows in a split, as in Hernández-Lobato & Adams (2015).

    Returns
    -------
    Problem
        Without a split, there are no test rows.

    Raises
    ------
    ValueError
        If a signal is to be split.
    """
    settings = settings_of(dataset).shortened(epochs)
    if dataset in SIGNALS:
        if split is not None:
            msg = f"got the split {split} of {dataset}. Expected one of {REGRESSION} for a split"
            raise ValueError(msg)
        x, y = sequences(signal(dataset))
        empty = x[:0], y[:0], torch.ones(1)
        return Problem(
            *(x, y, *empty),
            Recurrent,
            lambda hidden: 3 * hidden * (hidden + 2) + hidden + 1,
            16,
            settings,
        )
    data = datasets.load(dataset, directory)
    x, y, unit = data.x, data.y, torch.ones(data.y.shape[1])
    test = torch.zeros(len(x), dtype=torch.bool)
    if split is not None:
        test[datasets.load_splits(dataset, directory)[split]] = True
        scale = Standardization.of(y[~test])
        y, unit = scale.apply(y), scale.scale
    x = Standardization.of(x[~test]).apply(x)
    inputs, outputs = x.shape[1], y.shape[1]
    return Problem(
        *(x[~test], y[~test], x[test], y[test], unit),
        lambda hidden: fully_connected(inputs, hidden, outputs),
        lambda hidden: hidden * (inputs + 1 + outputs) + outputs,
        50,
        settings,
    )


def fully_connected(inputs: int, hidden: int, outputs: int) -> Callable[..., Any]:
    """Make a D-H-O ReLU network with unit Gaussian priors, and one noise precision per output.

    Returns
    -------
    callable
        A Pyro model of inputs and targets.
    """
    layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    network = bmr.bayesianize(nn.Sequential(*layers), prior=bmr.nn.normal())

    def model(x: Tensor, y: Tensor | None = None) -> None:
        precision = pyro.sample("precision", dist.Gamma(1.0, 1.0).expand([outputs]).to_event(1))
        mean = pyro.deterministic("mean", network(x))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, precision.rsqrt()).to_event(1), obs=y)

    return model


def make_guide(model: Callable[..., Any]) -> Any:
    """Make the guide: Normal weights that start near zero, and a Gamma noise precision.

    Returns
    -------
    AutoGuide
        For the model.
    """
    return bmr.mean_field(model, gamma=["precision"], init_loc_fn=_near_zero, init_scale=0.1)


def _near_zero(site: Any) -> Tensor:
    mean = init_to_mean(site)
    return mean if site["name"] == "precision" else mean + 0.01 * torch.randn_like(mean)
