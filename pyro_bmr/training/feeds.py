"""Where the batches of a training come from: rows of tensors in memory, or a loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.programs.batches import Batches
from pyro_bmr.programs.streams import Stream


class Feed(ABC):
    """The batches of each epoch; a ``cut`` is what a step is given to make its batch of."""

    batches: Batches
    # The generators of its own that it shuffles with, and what tells it from others.
    generators: Sequence[torch.Generator] = ()
    facts: tuple[Any, ...] = ()

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many batches an epoch has."""

    @abstractmethod
    def epoch(self) -> Iterable[Any]:
        """Cut all rows into batches, in another order each time."""

    @abstractmethod
    def examples(self) -> tuple[Any, Any, Any]:
        """Return a first cut, another one of its size, and one of the last batch's size."""

    @abstractmethod
    def count(self, cut: Any) -> int:
        """How many rows a cut has."""

    @abstractmethod
    def inputs(self, cut: Any) -> tuple[Tensor, ...]:
        """Return the tensors that a step takes for a cut."""

    @abstractmethod
    def batch(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make the batch of these tensors, in the order of `Batches.tensors`."""


class Rows(Feed):
    """Rows of tensors, of which a cut has the numbers."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    @property
    @override
    def steps(self) -> int:
        return -(-self.batches.size // (self.batches.batch_size or 1))

    @override
    def epoch(self) -> Iterable[Tensor]:
        rows = self._all()
        order = torch.randperm(len(rows), device="cpu").to(rows.device)
        return order.split(self.batches.batch_size or len(rows))

    @override
    def examples(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = self._all()
        first = rows[: self.batches.batch_size]
        other = rows.flip(0)[: self.batches.batch_size]
        return first, other, first[: len(rows) % len(first) or len(first)]

    @override
    def count(self, cut: Tensor) -> int:
        return len(cut)

    @override
    def inputs(self, cut: Tensor) -> tuple[Tensor, ...]:
        return cut, *self.batches.tensors.values()

    @override
    def batch(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows, *tensors = inputs
        return self.batches.pick(tensors, rows)

    def _all(self) -> Tensor:
        """Return the numbers of all rows, from 0, on the device of the data."""
        device = next((t.device for t in self.batches.tensors.values()), torch.device("cpu"))
        return torch.arange(self.batches.size, device=device)


class Loaded(Feed):
    """Batches as a loader gives them, each of which is its own cut."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.batches = stream.batches
        self.generators, self.facts = stream.generators, stream.facts

    @property
    @override
    def steps(self) -> int:
        return len(self.stream)

    @override
    def epoch(self) -> Iterable[tuple[Tensor, ...]]:
        return self.stream.epoch()

    @override
    def examples(self) -> tuple[Any, Any, Any]:
        size, take = self.batches.batch_size or 1, self.batches.take
        last = slice(self.batches.size % size or size)
        return take(slice(size)), take(slice(-size, None)), take(last)

    @override
    def count(self, cut: tuple[Tensor, ...]) -> int:
        return len(cut[0])

    @override
    def inputs(self, cut: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return cut

    @override
    def batch(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(inputs)
