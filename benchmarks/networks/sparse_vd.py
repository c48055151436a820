"""Sparse variational dropout: each weight is Gaussian, and its prior log-uniform.

Source: Molchanov, Ashukha & Vetrov (2017), arXiv:1701.05369. Biases have no distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from problems import Problem
from pruned import Pruned
from torch import Tensor, nn
from variational import VariationalLayer, draw_outputs, log_alpha, log_uniform_kl, train_layers

# The paper's is 3.
THRESHOLDS = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
# As in the authors' code: for 5 epochs there is no KL divergence, after 20 all of it.
WARM_UP = 5, 20


def train(problem: Problem, seed: int, folder: Path) -> Iterator[Pruned]:
    """Train it once; a level is a threshold of log α.

    A training of less than 40 epochs is warmed up for the same fractions as one of 40: where the KL
    divergence comes before anything is learned, it prunes everything.
    """
    length = max(problem.schedule.epochs, 2 * WARM_UP[1])
    start, end = (epochs / length for epochs in WARM_UP)
    return train_layers(problem, seed, folder / "trained.pt", SparseLayer, (start, end), THRESHOLDS)


class SparseLayer(VariationalLayer):
    """Weights are N(mean, exp(log_variance))."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.mean, self.bias = layer.weight, layer.bias
        self.log_variance = nn.Parameter(torch.full_like(layer.weight, -10.0))
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Draw outputs."""
        return draw_outputs(x, self.mean, self.log_variance.exp(), self.bias, self._generator)

    def kl(self) -> Tensor:
        """Compute that of all weights."""
        return log_uniform_kl(log_alpha(self.mean, self.log_variance)).sum()

    def prune(self, threshold: float) -> dict[str, Tensor]:
        """Compute means, zero for noisy weights."""
        mask = log_alpha(self.mean, self.log_variance) < threshold
        return {"weight": self.mean * mask, "bias": self.bias}
