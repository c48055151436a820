"""Adam as a function from state to state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AdamState(NamedTuple):
    """All parameters in one vector, with running means of the gradient and of its square."""

    values: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    @classmethod
    def start(cls, values: Tensor) -> AdamState:
        """Return the state before the first step."""
        return cls(values, torch.zeros_like(values), torch.zeros_like(values), values.new_zeros(()))


def update(
    state: AdamState, gradient: Tensor, lr: Tensor | float, clip_norm: float | None = None
) -> AdamState:
    r"""Take one step; a gradient longer than ``clip_norm`` is shortened to that first.

    .. math:: \theta \leftarrow \theta - \eta \frac{m / (1 - 0.9^t)}
              {\sqrt{v / (1 - 0.999^t)} + 10^{-8}}

    Source: Kingma & Ba (2015), arXiv:1412.6980, algorithm 1.
    """
    if clip_norm is not None:
        gradient = gradient * (clip_norm / gradient.norm().clamp(min=clip_norm))
    mean = torch.lerp(state.mean, gradient, 0.1)
    square = torch.lerp(state.square, gradient.square(), 0.001)
    steps = state.steps + 1
    # The corrections of the two means are numbers: let them not divide every element.
    rate, correction = lr / (1 - 0.9**steps), (1 - 0.999**steps).rsqrt()
    values = state.values - rate * mean / (square.sqrt() * correction + 1e-8)
    return AdamState(values, mean, square, steps)
