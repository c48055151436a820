"""What every method gives: a network with zeros where it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Pruned:
    """A pruned network, and how long it took to get there."""

    # What was asked for: a compression, or a threshold.
    level: float
    # By name, in the order of the network's parameters, zero where they are pruned.
    weights: Mapping[str, Tensor]
    # From images to class probabilities.
    predict: Callable[[Tensor], Tensor]
    # Of training so far.
    epochs: int
    seconds: float
    # Measures its size, and what only some methods have, by the names of the columns of results.
    measure: Callable[[], Mapping[str, Any]] | None = None


def make_pruned(
    network: nn.Sequential,
    weights: Mapping[str, Tensor],
    level: float,
    epochs: int,
    seconds: float,
) -> Pruned:
    """Put weights into a network, without those that cannot change what it computes."""
    kept = _drop_unread(weights)

    def predict(images: Tensor) -> Tensor:
        return functional_call(network, kept, images).softmax(-1)

    return Pruned(level, kept, predict, epochs, seconds)


def _drop_unread(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero what goes into hidden units that no weight takes, from the last layer to the first."""
    form = torch.contiguous_format
    kept = {name: value.detach().clone(memory_format=form) for name, value in weights.items()}
    layers = [name for name, value in kept.items() if value.dim() > 1]
    for name, reader in reversed(list(pairwise(layers))):
        units = len(kept[name])
        unread = (kept[reader] == 0).reshape(len(kept[reader]), units, -1).all(2).all(0)
        kept[name][unread] = 0
        kept[name.replace("weight", "bias")][unread] = 0
    return kept
