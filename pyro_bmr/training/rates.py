"""Learning rates over the course of a training."""

from __future__ import annotations

from collections.abc import Callable

_LAST = 0.01


def hold_and_fall(rate: float) -> Callable[[float], float]:
    """Hold a rate for the first half of a training, then let it fall linearly to a hundredth."""

    def at(done: float) -> float:
        return rate * (1 - (1 - _LAST) * max(0.0, 2 * done - 1))

    return at
