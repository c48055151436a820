"""Standard normal numbers in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_STREAMS = 4
# Fewer are drawn faster than threads are woken.
_THREADS_FROM = 1 << 18


class NormalSource:
    """Draws standard normal numbers, on the CPU in several threads, since torch takes one.

    They depend on the state of torch's generator when the source is made, or made anew, which is
    not used after that, and not on the number of threads.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self._numbers = like.new_empty(rows, columns)
        count = _STREAMS if like.device.type == "cpu" else 1
        self._generators = [torch.Generator(like.device) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count)
        self.renew()

    def renew(self) -> None:
        """Begin anew, at the state of torch's generator."""
        seeds = torch.randint(2**62, (_STREAMS,), device="cpu").tolist()
        for generator, seed in zip(self._generators, seeds, strict=False):
            generator.manual_seed(seed)

    def draw(self, rows: int) -> Tensor:
        """Draw a matrix of at most the source's rows, which overwrites the one before."""
        numbers = self._numbers[:rows]
        parts = numbers.view(-1).tensor_split(len(self._generators))

        def fill(part: Tensor, generator: torch.Generator) -> None:
            part.normal_(generator=generator)

        fill_all = self._threads.map if numbers.numel() > _THREADS_FROM else map
        list(fill_all(fill, parts, self._generators))
        return numbers

    def states(self) -> list[Tensor]:
        """Return where the source is."""
        return [generator.get_state() for generator in self._generators]

    def set_states(self, states: Sequence[Tensor]) -> None:
        """Go to where another source was; stay where its device had another number of streams."""
        if len(states) == len(self._generators):
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
