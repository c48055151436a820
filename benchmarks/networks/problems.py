"""What is learned: data, and the networks that learn them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_bmr.datasets import load_cifar10, load_mnist


@dataclass(frozen=True)
class Schedule:
    """Epochs of the first training and of those after each pruning, the same for all methods."""

    first: int
    rounds: tuple[int, ...]
    # Where methods go that do not say how far: all weights over those kept in the last round.
    compression: float
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

    def make_network(self, seed: int) -> nn.Sequential:
        """Make it in full width, as torch initialises it."""
        torch.manual_seed(seed)
        return self.make(self.widths)


def lenet_300_100(widths: Sequence[int]) -> nn.Sequential:
    """Two hidden layers (LeCun et al. 1998)."""
    first, second = widths
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, first), nn.ReLU()),
        *(nn.Linear(first, second), nn.ReLU()),
        nn.Linear(second, 10),
    )


def lenet_5(widths: Sequence[int]) -> nn.Sequential:
    """Two layers of filters, one of units (LeCun et al. 1998, in the widths of Caffe)."""
    first, second, third = widths
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * second, third), nn.ReLU()),
        nn.Linear(third, 10),
    )


def load_problem(name: str, directory: str | Path | None = None) -> Problem:
    """Load the data of a problem, pixels between 0 and 1, and say what learns them and how long."""
    return PROBLEMS[name](directory)


def _mnist(
    name: str,
    make: Callable[[Sequence[int]], nn.Sequential],
    widths: tuple[int, ...],
    schedule: Schedule,
) -> Callable[[str | Path | None], Problem]:
    def load(directory: str | Path | None) -> Problem:
        data, other = load_mnist(directory), load_cifar10(directory)
        strange = {
            "rotated": data.x_test.rot90(1, (2, 3)).contiguous(),
            "cifar10": _grey(other.x_test)[..., 2:-2, 2:-2].contiguous(),
        }
        rows = data.x, data.y, data.x_test, data.y_test
        return Problem(name, make, widths, schedule, *rows, strange)

    return load


def _grey(images: Tensor) -> Tensor:
    """Luma of ITU-R BT.601."""
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


PROBLEMS = {
    "lenet-300-100": _mnist(
        "lenet-300-100", lenet_300_100, (300, 100), Schedule(20, (*[10] * 8, 20), 200)
    ),
    "lenet-5": _mnist("lenet-5", lenet_5, (20, 50, 500), Schedule(8, (*[4] * 6, 8), 500)),
}
