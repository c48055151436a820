"""Standard normal numbers in bulk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_STREAMS = 4
# Fewer are drawn faster than threads are woken.
_THREADS_FROM = 1 << 18
_MULTIPLE = 4


class NormalSource:
    """Draws standard normal numbers, on the CPU in several threads, since torch takes one.

    They depend on the state of torch's generator when the source is made, or made anew, which is
    not used after that, and not on the number of threads.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        # Rows are aligned, as compiled code wants its inputs.
        self.numbers = like.new_zeros(rows, math.ceil(columns / _MULTIPLE) * _MULTIPLE)
        count = _STREAMS if like.device.type == "cpu" else 1
        self._generators = [torch.Generator(like.device) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count)
        self.renew()

    def renew(self) -> None:
        """Begin anew, at the state of torch's generator."""
        seeds = torch.randint(2**62, (_STREAMS,), device="cpu").tolist()
        for generator, seed in zip(self._generators, seeds, strict=False):
            generator.manual_seed(seed)

    def draw(self, rows: int) -> None:
        """Draw so many of the rows of ``numbers`` anew."""
        numbers = self.numbers[:rows]
        parts = numbers.view(-1).tensor_split(len(self._generators))

        def fill(part: Tensor, generator: torch.Generator) -> None:
            part.normal_(generator=generator)

        # On a GPU one thread does, whose stream is that of the caller.
        many = numbers.numel() > _THREADS_FROM and len(parts) > 1
        list((self._threads.map if many else map)(fill, parts, self._generators))

    def states(self) -> list[Tensor]:
        """Return where the source is."""
        return [generator.get_state() for generator in self._generators]

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Go to where another source was; stay where its device had another number of streams."""
        if len(states) == len(self._generators):
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
