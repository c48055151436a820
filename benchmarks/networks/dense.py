"""A dense network, trained for as long as the pruned ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from problems import Problem
from pruned import Pruned, make_pruned
from training import train_dense


def train(problem: Problem, seed: int, folder: Path) -> Iterator[Pruned]:
    """Train it by cross entropy; the only level is a compression of 1."""
    network = problem.make_network(seed).to(memory_format=torch.channels_last)
    generator = torch.Generator("cpu").manual_seed(seed)
    epochs = problem.schedule.epochs
    seconds = train_dense(problem, network, epochs, generator, folder / "dense.pt")
    yield make_pruned(network, dict(network.named_parameters()), 1.0, epochs, seconds)
