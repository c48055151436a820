"""Standard normal numbers in bulk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_BLOCK = 1 << 21


def normal_rows(columns: int, like: Tensor) -> Iterator[Tensor]:
    """Draw vectors of standard normal numbers without end.

    They are drawn ahead in a thread of their own, since torch draws in one thread only. They depend
    on the state of torch's generator at the first one, which is not used after that.

    Parameters
    ----------
    columns : int
        Length of each.
    like : Tensor
        Gives dtype and device.

    Yields
    ------
    Tensor
        Of shape ``(columns,)``.

    Examples
    --------
    >>> rows = normal_rows(3, torch.empty(0))
    >>> next(rows).shape
    torch.Size([3])
    """
    generator = torch.Generator(like.device).manual_seed(int(torch.randint(2**62, ())))
    shape = max(1, _BLOCK // max(1, columns)), columns

    def draw() -> tuple[Tensor, ...]:
        return like.new_empty(shape).normal_(generator=generator).unbind()

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(draw)
        while True:
            block = ahead.result()
            ahead = thread.submit(draw)
            yield from block
