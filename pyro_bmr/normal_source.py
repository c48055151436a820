"""Standard normal numbers in bulk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_STREAMS = 4
# Fewer are drawn faster than threads are woken.
_THREADS_FROM = 1 << 16


class NormalSource:
    """Draws standard normal numbers, on the CPU in several threads.

    The numbers depend on the state of torch's generator when the source is made, and not on how
    many threads there are.

    Parameters
    ----------
    like : Tensor
        Gives dtype and device.

    Examples
    --------
    >>> NormalSource(torch.empty(0)).draw(2, 3).shape
    torch.Size([2, 3])
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        seeds = torch.randint(2**62, (_STREAMS,)).tolist()
        count = _STREAMS if like.device.type == "cpu" else 1
        self._generators = [torch.Generator(like.device).manual_seed(s) for s in seeds[:count]]
        self._threads = ThreadPoolExecutor(count)

    def draw(self, rows: int, columns: int) -> Tensor:
        """Draw a matrix.

        Parameters
        ----------
        rows, columns : int
            Its shape.

        Returns
        -------
        Tensor
            Independent standard normal numbers.
        """
        values = self._like.new_empty(rows * columns)
        parts = values.tensor_split(len(self._generators))

        def fill(part: Tensor, generator: torch.Generator) -> None:
            part.normal_(generator=generator)

        fill_all = self._threads.map if len(values) > _THREADS_FROM else map
        list(fill_all(fill, parts, self._generators))
        return values.view(rows, columns)
