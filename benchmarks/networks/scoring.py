"""How good a network is, and how small."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from problems import Problem
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmr.diagnostics.calibration import calibration_error

ROWS = 100


def judge(predict: Callable[[Tensor], Tensor], problem: Problem) -> dict[str, float]:
    """Score class probabilities of unseen images.

    Out-of-distribution AUROC is that of the entropy of the probabilities, strange images positive.
    """
    chances = _predict(predict, problem.x_test)
    right = torch.nn.functional.one_hot(problem.y_test, chances.shape[-1])
    entropy = _entropy(chances)
    scores = {
        "error": 100 * (chances.argmax(-1) != problem.y_test).double().mean().item(),
        "nll": -(chances * right).sum(-1).clamp(min=1e-12).log().mean().item(),
        "ece": calibration_error(chances, problem.y_test).item(),
        "brier": (chances - right).square().sum(-1).mean().item(),
    }
    for name, images in problem.strange.items():
        other = _entropy(_predict(predict, images))
        labels = torch.cat([torch.zeros_like(entropy), torch.ones_like(other)])
        scores[f"auroc_{name}"] = roc_auc_score(labels, torch.cat([entropy, other]))
    return scores


def count(problem: Problem, weights: Mapping[str, Tensor]) -> dict[str, object]:
    """Count what is left of layers in a row: weights with biases, living units, FLOPs of an image.

    Compression is how many times fewer weights and biases these are than all.
    """
    whole = sum(value.numel() for value in problem.make(problem.widths).parameters())
    left = sum(int(value.count_nonzero()) for value in weights.values())
    layers = [value for value in weights.values() if value.dim() > 1]
    widths = living_widths(layers)
    return {
        "weights": left,
        "compression": whole / left,
        "widths": "-".join(map(str, (*widths, len(layers[-1])))),
        "flops": _count_flops(problem.make(widths), problem.x_test[:1]) if all(widths) else 0,
    }


def living_widths(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Count the units of each hidden layer that take something, and are taken by something.

    A unit that dies can leave others without input or without a reader, so that this is repeated.
    """
    kept = [(value != 0).contiguous() for value in weights]
    # By hidden layer: what its units take, and what takes them, with an axis of units each.
    taking = [mask.flatten(1) for mask in kept[:-1]]
    pairs = pairwise(kept)
    taken = [after.reshape(len(after), len(before), -1) for before, after in pairs]
    while True:
        alive = [a.any(1) & b.any(2).any(0) for a, b in zip(taking, taken, strict=True)]
        before = sum(int(mask.sum()) for mask in kept)
        for a, b, living in zip(taking, taken, alive, strict=True):
            a[~living] = False
            b[:, ~living] = False
        if sum(int(mask.sum()) for mask in kept) == before:
            return tuple(int(living.sum()) for living in alive)


def _predict(predict: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([predict(part) for part in images.split(ROWS)]).double()


def _entropy(chances: Tensor) -> Tensor:
    return -torch.special.xlogy(chances, chances).sum(-1)


def _count_flops(network: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return counter.get_total_flops()
