"""Mini-batches, steps and rates, the same for all rivals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from problems import Problem
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyro_bmr.training.rates import hold_and_fall

# Of images, their classes, and the fraction of the training done.
Loss = Callable[[Tensor, Tensor, float], Tensor]


def minimise(
    problem: Problem,
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    epochs: int,
    generator: torch.Generator,
    project: Callable[[], None] = lambda: None,
) -> float:
    """Minimise by Adam, from the full rate, projecting after each step; return the seconds."""
    begin = time.perf_counter()
    size, rate = problem.schedule.batch_size, hold_and_fall(problem.schedule.lr)
    optimizer = torch.optim.Adam(parameters, fused=True)
    rows, step = len(problem.x), 0
    steps = epochs * math.ceil(rows / size)
    for _ in range(epochs):
        for batch in torch.randperm(rows, generator=generator, device="cpu").split(size):
            done = step / steps
            optimizer.param_groups[0]["lr"] = rate(done)
            optimizer.zero_grad()
            loss(problem.x[batch], problem.y[batch], done).backward()
            optimizer.step()
            with torch.no_grad():
                project()
            step += 1
    return time.perf_counter() - begin


def train_dense(
    problem: Problem,
    network: nn.Sequential,
    epochs: int,
    generator: torch.Generator,
    project: Callable[[], None] = lambda: None,
) -> float:
    """Minimise the cross entropy of a network's classes; return the seconds."""

    def loss(x: Tensor, y: Tensor, _done: float) -> Tensor:
        return cross_entropy(network(x), y)

    return minimise(problem, list(network.parameters()), loss, epochs, generator, project)
