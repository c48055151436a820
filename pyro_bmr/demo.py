"""What the demo needs: a Bayesian network, data on one scale, and scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn


class Regression(PyroModule):
    """A D-H-1 ReLU network with unit Gaussian priors and a Gamma(1, 1) noise precision."""

    def __init__(self, inputs: int, hidden: int = 50) -> None:
        super().__init__()
        self.fc1 = PyroModule[nn.Linear](inputs, hidden)
        self.fc2 = PyroModule[nn.Linear](hidden, 1)
        for layer in (self.fc1, self.fc2):
            for name, value in list(layer.named_parameters()):
                prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                setattr(layer, name, PyroSample(prior))
        self.precision = PyroSample(dist.Gamma(1.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean of the targets, ``(rows,)``, and observe them where there are any."""
        mean = self.fc2(self.fc1(x).relu()).squeeze(-1)
        scale = self.precision.rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)
        return pyro.deterministic("mean", mean)


@dataclass(frozen=True)
class Standardization:
    """Location and scale of each column of data."""

    loc: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Standardization:
        """Read them from data of shape ``(rows, columns)``; a constant column has scale 1."""
        scale = values.std(0, correction=0)
        return cls(values.mean(0), torch.where(scale > 0, scale, 1))

    def apply(self, values: Tensor) -> Tensor:
        """Standardise."""
        return (values - self.loc) / self.scale


@dataclass(frozen=True)
class MeanScore:
    """A mean over test rows and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def predictive_scores(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    unit: float,
    draws: int = 300,
) -> tuple[MeanScore, MeanScore]:
    """Return RMSE and log likelihood per row in original units, where a target of 1 is ``unit``."""
    sites = ("mean", "precision")
    samples = Predictive(model, guide=guide, num_samples=draws, return_sites=sites)(x)
    mean, precision = samples["mean"], samples["precision"].reshape(-1, 1)
    square = (unit * (mean.mean(0) - y)).square()
    rmse = float(square.mean().sqrt())
    each = dist.Normal(mean, precision.rsqrt()).log_prob(y).logsumexp(0)
    log_likelihood = each - math.log(draws) - math.log(unit)
    rows = len(y) ** 0.5
    return (
        MeanScore(rmse, float(square.std() / rows / (2 * rmse))),
        MeanScore(float(log_likelihood.mean()), float(log_likelihood.std() / rows)),
    )
