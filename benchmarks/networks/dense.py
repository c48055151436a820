"""A dense network, trained for as long as the pruned ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from problems import Problem
from pruned import Pruned, make_pruned
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import minimise


def train(problem: Problem, seed: int) -> Iterator[Pruned]:
    """Train it by cross entropy; the only level is a compression of 1."""
    network = problem.make_network(seed).to(memory_format=torch.channels_last)
    generator = torch.Generator("cpu").manual_seed(seed)
    epochs = problem.schedule.epochs

    def loss(x: Tensor, y: Tensor, _done: float) -> Tensor:
        return cross_entropy(network(x), y)

    seconds = minimise(problem, list(network.parameters()), loss, epochs, generator)
    yield make_pruned(network, dict(network.named_parameters()), 1.0, epochs, seconds)
