"""Mini-batches, steps and rates, the same for all rivals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from problems import Problem
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyro_bmr.training.rates import hold_and_fall

# Of dense networks (Han et al. 2015, sec. 3.1): of that which nothing needs it leaves little.
WEIGHT_DECAY = 1e-4

# Of images, their classes, and the fraction of the training done.
Loss = Callable[[Tensor, Tensor, float], Tensor]


def minimise(
    problem: Problem,
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    epochs: int,
    generator: torch.Generator,
    path: Path,
    project: Callable[[], None] = lambda: None,
    weight_decay: float = 0.0,
) -> float:
    """Minimise by Adam, from the full rate, projecting after each step; return the seconds.

    Each epoch goes into a file, from which a killed run goes on.
    """
    size, rate = problem.schedule.batch_size, hold_and_fall(problem.schedule.lr)
    optimizer = torch.optim.Adam(parameters, weight_decay=weight_decay, fused=True)
    settings = problem.schedule.lr, size, epochs, weight_decay, len(problem.x)
    progress = _Progress(path, settings, parameters, optimizer, generator)
    done, seconds = progress.read()
    rows = len(problem.x)
    step, steps = (count * math.ceil(rows / size) for count in (done, epochs))
    for epoch in range(done, epochs):
        begin = time.perf_counter()
        for batch in torch.randperm(rows, generator=generator, device="cpu").split(size):
            optimizer.param_groups[0]["lr"] = rate(step / steps)
            optimizer.zero_grad()
            loss(problem.x[batch], problem.y[batch], step / steps).backward()
            optimizer.step()
            with torch.no_grad():
                project()
            step += 1
        seconds += time.perf_counter() - begin
        progress.write(epoch + 1, seconds)
    return seconds


@dataclass(frozen=True)
class _Progress:
    """A training as far as it is in a file; ``settings`` are those that it must have begun with."""

    path: Path
    settings: tuple[float, ...]
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Adam
    generator: torch.Generator

    def write(self, epochs: int, seconds: float) -> None:
        states = self.optimizer.state_dict(), self.generator.get_state()
        partial = self.path.with_suffix(".partial")
        torch.save((self.settings, list(self.parameters), *states, (epochs, seconds)), partial)
        partial.replace(self.path)

    def read(self) -> tuple[int, float]:
        if not self.path.exists():
            return 0, 0.0
        settings, values, moments, noise, (epochs, seconds) = torch.load(self.path)
        if settings != self.settings:
            msg = (
                f"{self.path} is of another training: rate, batch, epochs, penalty and images were "
                f"{settings} and are {self.settings}. Expected the same ones, or another folder "
                "for --work"
            )
            raise ValueError(msg)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(moments)
        self.generator.set_state(noise)
        return epochs, seconds


def train_dense(
    problem: Problem,
    network: nn.Sequential,
    epochs: int,
    generator: torch.Generator,
    path: Path,
    project: Callable[[], None] = lambda: None,
) -> float:
    """Minimise the cross entropy of a network's classes with an L2 penalty; return the seconds."""

    def loss(x: Tensor, y: Tensor, _done: float) -> Tensor:
        return cross_entropy(network(x), y)

    parameters = list(network.parameters())
    return minimise(problem, parameters, loss, epochs, generator, path, project, WEIGHT_DECAY)
