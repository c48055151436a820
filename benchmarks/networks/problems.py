"""What is learned: data, and the networks that learn them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import colour_lenet, lenet_5, lenet_300_100, resnet_8, vision_transformer
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_bmr.datasets import load_cifar10, load_mnist

# Images of nothing that a network learns.
STRANGE = 2_000


@dataclass(frozen=True)
class Schedule:
    """Epochs of the first training and of those after each pruning, the same for all methods."""

    first: int
    rounds: tuple[int, ...]
    # Where methods go that do not say how far: all weights over those kept in the last round.
    compression: float
    # By how much F may rise, in nats, for an element that goes in the last round of ours.
    margin: float
    batch_size: int = 128
    lr: float = 1e-3

    def compress(self, number: int) -> float:
        """Say how far to go in a round, if each keeps the same fraction of what there is."""
        return self.compression ** (number / len(self.rounds))

    @property
    def epochs(self) -> int:
        """All of them."""
        return self.first + sum(self.rounds)


@dataclass(frozen=True)
class Problem:
    """Images and their classes, and a network for them whose hidden layers can have any widths."""

    name: str
    make: Callable[[Sequence[int]], nn.Sequential]
    widths: tuple[int, ...]
    schedule: Schedule
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    # Images of nothing that it learns, by name.
    strange: Mapping[str, Tensor]
    # Of a posterior, for scores; fewer where they take long.
    draws: int = 20
    # Of the free energy, for ours; weights are drawn once for a batch where rows take too long.
    estimator: str = "local"

    def make_network(self, seed: int) -> nn.Sequential:
        """Make it in full width, as torch initialises it."""
        torch.manual_seed(seed)
        return self.make(self.widths)


@dataclass(frozen=True)
class Task:
    """A network to make, how long it learns, and what."""

    make: Callable[[Sequence[int]], nn.Sequential]
    widths: tuple[int, ...]
    schedule: Schedule
    read: Callable[[str | Path | None], tuple[Any, ...]]
    draws: int = 20
    estimator: str = "local"


def load_problem(name: str, directory: str | Path | None = None) -> Problem:
    """Load the data of a problem from the directory of `pyro_bmr.datasets`."""
    task = PROBLEMS[name]
    data = task.read(directory)
    own = {"draws": task.draws, "estimator": task.estimator}
    return Problem(name, task.make, task.widths, task.schedule, *data, **own)


def _read_mnist(directory: str | Path | None) -> tuple[Any, ...]:
    """Pixels between 0 and 1; strange are digits on their side, and photographs in grey."""
    data, other = load_mnist(directory), load_cifar10(directory)
    # Luma of ITU-R BT.601.
    grey = (other.x_test[:STRANGE] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(
        1, keepdim=True
    )
    strange = {
        "rotated": data.x_test[:STRANGE].rot90(1, (2, 3)).contiguous(),
        "cifar10": grey[..., 2:-2, 2:-2].contiguous(),
    }
    return data.x, data.y, data.x_test, data.y_test, strange


def _read_cifar10(directory: str | Path | None) -> tuple[Any, ...]:
    """Each colour centred and in units of its standard deviation; strange are digits."""
    data, other = load_cifar10(directory), load_mnist(directory)
    mean, spread = data.x.mean((0, 2, 3)), data.x.std((0, 2, 3))

    def scale(images: Tensor) -> Tensor:
        return (images - mean[:, None, None]) / spread[:, None, None]

    digits = pad(other.x_test[:STRANGE], (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return scale(data.x), data.y, scale(data.x_test), data.y_test, {"mnist": scale(digits)}


_MNIST, _CIFAR10 = _read_mnist, _read_cifar10
_LONG = (*[15] * 8, 40)
_FOURS = (*[4] * 8, 12)
PROBLEMS = {
    "lenet-300-100": Task(lenet_300_100, (300, 100), Schedule(40, _LONG, 100, 0.1), _MNIST, 100),
    "lenet-5": Task(
        *(lenet_5, (20, 50, 500), Schedule(16, (*_FOURS, 40), 300, 0.01 * 50 ** (9 / 8)), _MNIST),
        draws=100,
    ),
    "lenet-cifar10": Task(colour_lenet, (20, 50, 500), Schedule(20, _FOURS, 100, 0.5), _CIFAR10),
    "resnet-8": Task(
        *(resnet_8, (16, 32, 64), Schedule(16, (4, 4, 4, 4, 24), 6, 1.0), _CIFAR10),
        estimator="global",
    ),
    "transformer": Task(
        *(vision_transformer, (32, 64), Schedule(20, _FOURS, 50, 0.1), _MNIST),
        estimator="global",
    ),
}
