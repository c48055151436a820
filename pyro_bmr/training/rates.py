"""Learning rates over the course of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from pyro.optim import PyroOptim

from pyro_bmr.arguments.checks import read_number, read_positive, refuse_kind, show

_LAST = 0.01

Rate = Callable[[float], float]


def read_rate(lr: Any) -> Rate:
    """Read a learning rate: a positive number, or a function of the fraction of training done."""
    if isinstance(lr, Real) and not isinstance(lr, bool):
        rate = read_positive("lr", lr)
        return lambda _: rate
    if not callable(lr) or isinstance(lr, type | PyroOptim | torch.optim.Optimizer):
        expected = (
            "a number, or a function of the fraction of the training done, such as "
            "lambda done: 0.01 * (1 - done)"
        )
        refuse_kind("lr", lr, expected)

    def at(done: float) -> float:
        try:
            rate = lr(done)
        except Exception as error:
            error.add_note(
                f"got lr={show(lr)}, which fails at {done}. Expected a function of the fraction of "
                "the training done"
            )
            raise
        expected = "a rate that is a number, 0 or more, whatever the fraction of the training"
        rate = rate.item() if isinstance(rate, torch.Tensor) and rate.numel() == 1 else rate
        return read_number(f"lr({done:.3g})", rate, lambda one: 0 <= one < math.inf, expected)

    return at


def hold_and_fall(rate: float) -> Callable[[float], float]:
    """Hold a rate for the first half of a training, then let it fall linearly to a hundredth."""

    def at(done: float) -> float:
        return rate * (1 - (1 - _LAST) * max(0.0, 2 * done - 1))

    return at
