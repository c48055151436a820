"""What a callback of `fit` and `prune` learns after each epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """An epoch that is done.

    Parameters
    ----------
    epoch : int
        Its number, from 0; in `prune` it goes on from training to training.
    loss : float
        The mean of the loss over the epoch, in nats.
    guide : callable
        The guide that is trained, as it is now: to draw from, not to change.
    round : int
        The round of `prune`, 0 before the first reduction and in `fit`.

    Examples
    --------
    >>> Epoch(0, 12.5, guide=None).loss
    12.5
    """

    epoch: int
    loss: float
    guide: Callable[..., Any]
    round: int = 0


Callback = Callable[[Epoch], object]
