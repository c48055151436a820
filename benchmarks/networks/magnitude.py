"""Small weights are pruned, the others trained again, round by round.

What is small is so beside the other weights that its layer has left, as where Han et al. prune each
layer by a multiple of its standard deviation. By size alone, over all layers, the error was half as
large again at high compressions, and it was larger in units of the dense network's layers.

Source: Han, Pool, Tran & Dally (2015), arXiv:1506.02626; Zhu & Gupta (2017), arXiv:1710.01878.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from problems import Problem
from pruned import Pruned, make_pruned
from torch import Tensor
from training import train_dense


def train(problem: Problem, seed: int) -> Iterator[Pruned]:
    """Train a dense network, then prune and train it again in each round, by compression."""
    schedule = problem.schedule
    network = problem.make_network(seed).to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    generator = torch.Generator("cpu").manual_seed(seed)

    epochs = schedule.first
    seconds = train_dense(problem, network, epochs, generator)
    for number, length in enumerate(schedule.rounds, 1):
        compression = schedule.compress(number)
        masks = keep_largest(parameters, compression)

        def hold(masks: Mapping[str, Tensor] = masks) -> None:
            for name, mask in masks.items():
                parameters[name].mul_(mask)

        with torch.no_grad():
            hold()
        seconds += train_dense(problem, network, length, generator, hold)
        epochs += length
        yield make_pruned(network, parameters, compression, epochs, seconds)


def keep_largest(weights: Mapping[str, Tensor], compression: float) -> dict[str, Tensor]:
    """Mask the largest in all layers together, each in units of its layer, True where kept."""
    sizes = {name: value.detach().abs() / _unit(weights, name) for name, value in weights.items()}
    everything = torch.cat([size.flatten() for size in sizes.values()])
    smallest = everything.topk(round(len(everything) / compression)).values[-1]
    return {name: size >= smallest for name, size in sizes.items()}


def _unit(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Compute the root mean square of the weights that are left in the layer of a parameter."""
    layer = weights[name.replace("bias", "weight")].detach()
    return (layer.square().sum() / layer.count_nonzero().clamp(min=1)).sqrt().clamp(min=1e-12)
