"""Small weights are pruned, the others trained again, round by round.

Large is what has a large share of its layer, which keeps the last layers from dying (LAMP). By size
alone the error was as small up to a compression of 30, and up to twice as large beyond.

Source: Han, Pool, Tran & Dally (2015), arXiv:1506.02626; Zhu & Gupta (2017), arXiv:1710.01878; Lee,
Park, Mo, Ahn & Shin (2021), arXiv:2010.07611.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from problems import Problem
from pruned import Pruned, make_pruned
from torch import Tensor
from training import train_dense


def train(problem: Problem, seed: int, folder: Path) -> Iterator[Pruned]:
    """Train a dense network, then prune and train it again in each round, by compression."""
    schedule = problem.schedule
    network = problem.make_network(seed).to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    generator = torch.Generator("cpu").manual_seed(seed)

    epochs = schedule.first
    seconds = train_dense(problem, network, epochs, generator, folder / "dense.pt")
    for number, length in enumerate(schedule.rounds, 1):
        compression = schedule.compress(number)
        masks = keep_largest(parameters, compression)

        def hold(masks: Mapping[str, Tensor] = masks) -> None:
            for name, mask in masks.items():
                parameters[name].mul_(mask)

        with torch.no_grad():
            hold()
        path = folder / f"round-{number}.pt"
        seconds += train_dense(problem, network, length, generator, path, hold)
        epochs += length
        yield make_pruned(network, parameters, compression, epochs, seconds)


def keep_largest(weights: Mapping[str, Tensor], compression: float) -> dict[str, Tensor]:
    """Mask those of the largest shares in all layers together, True where kept."""
    shares = _shares(weights)
    everything = torch.cat([share.flatten() for share in shares.values()])
    smallest = everything.topk(round(len(everything) / compression)).values[-1]
    return {name: share >= smallest for name, share in shares.items()}


def _shares(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute w² over the sum of all squares that are no smaller in the weights and biases of w."""
    shares = {}
    for name in (name for name, value in weights.items() if value.dim() > 1):
        pair = [weights[part].detach() for part in (name, name.replace("weight", "bias"))]
        squares = torch.cat([value.flatten() for value in pair]).double().square()
        ordered, places = squares.sort(descending=True)
        share = torch.empty_like(squares).scatter(0, places, ordered / ordered.cumsum(0))
        parts = share.split([value.numel() for value in pair])
        shares[name], shares[name.replace("weight", "bias")] = map(Tensor.view_as, parts, pair)
    return shares
