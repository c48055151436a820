"""Bayesian compression: groups of weights share a scale with a normal-Jeffreys prior (BC-GNJ).

A group is what one input of linear units feeds, or one filter with its bias. Biases have no
distribution of their own. Source: Louizos, Ullrich & Welling (2017), arXiv:1705.08665.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from problems import Problem
from pruned import Pruned
from torch import Tensor, nn
from variational import VariationalLayer, draw_outputs, log_alpha, log_uniform_kl, train_layers

# The paper chooses one by eye for each layer.
THRESHOLDS = (3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0)
WARM_UP = 0.0, 0.5


def train(problem: Problem, seed: int, folder: Path) -> Iterator[Pruned]:
    """Train it once; a level is a threshold of the scales' log α."""
    return train_layers(problem, seed, folder / "trained.pt", GroupLayer, WARM_UP, THRESHOLDS)


class GroupLayer(VariationalLayer):
    """Weights given the scale z of their group are N(z mean, z² exp(log_variance)), eq. 6."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.mean, self.bias = layer.weight, layer.bias
        self.log_variance = nn.Parameter(torch.full_like(layer.weight, -9.0))
        self._filters = layer.weight.dim() == 4
        groups = layer.weight[:, 0, 0, 0] if self._filters else layer.weight[0]
        self.scale = nn.Parameter(torch.ones_like(groups))
        self.log_scale_variance = nn.Parameter(torch.full_like(groups, -9.0))
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Draw scales and outputs for each image."""
        noise = x.new_empty(len(x), len(self.scale)).normal_(generator=self._generator)
        scale = torch.addcmul(self.scale, (0.5 * self.log_scale_variance).exp(), noise)
        weights = self.mean, self.log_variance.exp(), self.bias
        if self._filters:
            return draw_outputs(x, *weights, self._generator) * scale[..., None, None]
        return draw_outputs(x * scale, *weights, self._generator)

    def kl(self) -> Tensor:
        """Compute that of the scales, and that of the weights given them, eq. 8."""
        variance = self.log_variance.exp()
        weights = 0.5 * (variance + self.mean.square() - 1 - self.log_variance).sum()
        return weights + log_uniform_kl(log_alpha(self.scale, self.log_scale_variance)).sum()

    def prune(self, threshold: float) -> dict[str, Tensor]:
        """Compute means, zero for noisy groups."""
        scale = self.scale * (log_alpha(self.scale, self.log_scale_variance) < threshold)
        if self._filters:
            weight = self.mean * scale[:, None, None, None]
            return {"weight": weight, "bias": self.bias * scale}
        return {"weight": self.mean * scale, "bias": self.bias}
