"""Where the batches of a training come from: rows of tensors in memory, or a loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.programs.batches import Batches
from pyro_bmr.programs.calls import without_inference_mode
from pyro_bmr.programs.fingerprints import fingerprint_rows
from pyro_bmr.programs.ranks import Ranks
from pyro_bmr.programs.streams import Stream, read_stream_or_data


def read_feed(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Any,
    batch_size: int | None,
    ranks: Ranks,
) -> Feed:
    """Read the data of a training."""
    with ranks.together():
        data = read_stream_or_data(model, guide, args, kwargs, batch_size)
        if data.stream is None:
            given = without_inference_mode(data.args, data.kwargs)
            batches = Batches(*given, 1 if ranks.are_many else batch_size)
            batches.check()
        ranks.check_no_loader(data.stream)
    if data.stream is not None:
        return Loaded(data.stream)
    return _read_shard(batches, batch_size, ranks) if ranks.are_many else Rows(batches)


def find_facts(batches: Batches, ranks: Ranks, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what tells data from others; of many ranks, whichever of them has which rows."""
    if not ranks.are_many:
        return (*batches.args, *batches.kwargs.values(), *others)
    batches.check()
    told = fingerprint_rows(batches.tensors.values())
    return sum(ranks.gather_rows(batches.size)), f"{sum(ranks.gather(told)) % 2**64:x}"


def _read_shard(batches: Batches, batch_size: int | None, ranks: Ranks) -> Shard:
    """Find how many of its rows a rank takes in each of the steps that all take together."""
    rows = ranks.gather_rows(batches.size)
    size = sum(rows) if batch_size is None else batch_size
    if size > sum(rows):
        refuse("batch_size", batch_size, f"{sum(rows)} at most, the rows of all ranks")
    steps = -(-sum(rows) // size)
    return Shard(replace(batches, batch_size=-(-batches.size // steps)), steps, rows)


# The first of them has a row for each of the batch.
Cut = tuple[Tensor, ...]


class Feed(ABC):
    """The batches of each epoch; a ``cut`` are the tensors that a step makes its batch of."""

    batches: Batches
    # The generators of its own that it shuffles with, and what tells it from others.
    generators: Sequence[torch.Generator] = ()
    facts: tuple[Any, ...] = ()
    # How many rows each of the processes has, if there are many.
    shards: Sequence[int] = ()

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many batches an epoch has."""

    @abstractmethod
    def epoch(self) -> Iterable[Cut]:
        """Cut all rows into batches, in another order each time."""

    @abstractmethod
    def examples(self) -> tuple[Cut, Cut, Cut]:
        """Return a first cut, another one of its size, and one of the last batch's size."""

    @abstractmethod
    def inputs(self, cut: Cut) -> Cut:
        """Return the tensors that a step takes for a cut."""

    @abstractmethod
    def batch(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Make the batch of these tensors, in the order of `Batches.tensors`."""


class Rows(Feed):
    """Rows of tensors, of which a cut has the numbers."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self._tensors = tuple(batches.tensors.values())
        self._device = self._tensors[0].device if self._tensors else torch.device("cpu")

    @property
    @override
    def steps(self) -> int:
        return -(-self.batches.size // (self.batches.batch_size or 1))

    @override
    def epoch(self) -> Iterable[Cut]:
        size = self.batches.size
        order = torch.randperm(size, device="cpu").to(self._device)
        return zip(order.split(self.batches.batch_size or size), strict=True)

    @override
    def examples(self) -> tuple[Cut, Cut, Cut]:
        rows = self._all()
        first = rows[: self.batches.batch_size]
        other = rows.flip(0)[: self.batches.batch_size]
        return (first,), (other,), (first[: len(rows) % len(first) or len(first)],)

    @override
    def inputs(self, cut: Cut) -> Cut:
        return *cut, *self._tensors

    @override
    def batch(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows, *tensors = inputs
        return self.batches.pick(tensors, rows)

    def _all(self) -> Tensor:
        """Return the numbers of all rows, from 0, on the device of the data."""
        return torch.arange(self.batches.size, device=self._device)


class Shard(Rows):
    """The rows of one of many processes, which all take as many batches of them in an epoch.

    Batches are of one size: the last one is filled up by rows of the first.
    """

    def __init__(self, batches: Batches, steps: int, shards: Sequence[int]) -> None:
        super().__init__(batches)
        self._steps = steps
        self.shards = shards
        self.generator = torch.Generator("cpu")

    @property
    @override
    def steps(self) -> int:
        return self._steps

    @override
    def epoch(self) -> Iterable[Cut]:
        order = torch.randperm(self.batches.size, generator=self.generator, device="cpu")
        size = self.batches.batch_size or len(order)
        filled = order[torch.arange(self.steps * size, device="cpu") % len(order)]
        return zip(filled.to(self._device).split(size), strict=True)

    @override
    def examples(self) -> tuple[Cut, Cut, Cut]:
        first, other, _ = super().examples()
        return first, other, first


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
    def epoch(self) -> Iterable[Cut]:
        return self.stream.epoch()

    @override
    def examples(self) -> tuple[Cut, Cut, Cut]:
        size, take = self.batches.batch_size or 1, self.batches.take
        last = slice(self.batches.size % size or size)
        return take(slice(size)), take(slice(-size, None)), take(last)

    @override
    def inputs(self, cut: Cut) -> Cut:
        return cut

    @override
    def batch(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(inputs)
