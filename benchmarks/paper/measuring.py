"""What is measured of a network: its free energy and its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problems import Problem
from pyro import poutine
from pyro.infer import Predictive
from torch.distributions import Normal

import pyro_bmr as bmr
from pyro_bmr.estimators.elbos import UnbiasedELBO

# Copies of the data are measured together, up to about so many rows.
_ROWS = 4096


@dataclass(frozen=True)
class FreeEnergy:
    """F = complexity - accuracy, in nats, and the standard error of F."""

    free_energy: float
    complexity: float
    accuracy: float
    free_energy_error: float


@dataclass(frozen=True)
class Scores:
    """Of predictions of test rows, in the units of the targets; none without test rows."""

    rmse: float | None = None
    test_log_likelihood: float | None = None


class Meter:
    """Measures the free energy of the reductions of a network, always with the same random numbers.

    By an estimator without bias, whatever the network was trained by. It looks at the structure of
    a program at its first step; all reductions have the same, so that it looks once, at few rows.
    """

    def __init__(self, problem: Problem) -> None:
        self._copies = max(1, round(_ROWS / len(problem.x)))
        self._data = [
            data.repeat(self._copies, *[1] * (data.dim() - 1)) for data in (problem.x, problem.y)
        ]
        self._few = problem.x[:4], problem.y[:4]
        # Without its observations, a model's free energy is the divergence from the prior.
        self._prior = poutine.block(self._model, hide=["obs"])
        self._full_elbo, self._prior_elbo = UnbiasedELBO(), UnbiasedELBO()
        self._is_planned = False

    def measure(self, reduction: bmr.Reduction, draws: int) -> FreeEnergy:
        """Measure F on all training rows.

        Parameters
        ----------
        reduction : Reduction
            The model and the guide.
        draws : int
            Of several copies of the data, which have noise of their own each.

        Returns
        -------
        FreeEnergy
            In nats.
        """
        self._reduction = reduction
        with torch.random.fork_rng(devices=[]):
            if not self._is_planned:
                self._full_elbo.loss(self._model, self._guide, *self._few)
                self._is_planned = True
            complexity = self._prior_elbo.loss(self._prior, self._guide, *self._few)
            torch.manual_seed(0)
            losses = [
                self._full_elbo.loss(self._model, self._guide, *self._data) for _ in range(draws)
            ]
        each = (complexity - torch.tensor(losses, dtype=torch.float64)) / self._copies
        accuracy = float(each.mean())
        error = float(each.std() / draws**0.5) if draws > 1 else float("nan")
        return FreeEnergy(complexity - accuracy, complexity, accuracy, error)

    def _model(self, *args: Any) -> Any:
        return self._reduction.model(*args)

    def _guide(self, *args: Any) -> Any:
        return self._reduction.guide(*args)


def predictive_scores(
    model: Callable[..., Any], guide: Callable[..., Any], problem: Problem, draws: int = 200
) -> Scores:
    """Score predictions of the test rows.

    Returns
    -------
    Scores
        Root mean squared error over rows and outputs, and the mean over rows of the log density of
        all outputs.
    """
    if len(problem.test_x) == 0:
        return Scores()
    sites = ("mean", "precision")
    predict = Predictive(model, guide=guide, num_samples=draws, return_sites=sites)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = predict(problem.test_x)
    mean, precision = samples["mean"], samples["precision"].reshape(draws, 1, -1)
    error = problem.unit * (mean.mean(0) - problem.test_y)
    each = Normal(mean, precision.rsqrt()).log_prob(problem.test_y) - problem.unit.log()
    log_likelihood = (each.sum(-1).logsumexp(0) - math.log(draws)).mean()
    return Scores(float(error.square().mean().sqrt()), float(log_likelihood))
