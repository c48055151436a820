"""Data that need not fit into memory: a loader of torch, or a dataset, read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from pyro_bmr.arguments.arrays import is_array, to_tensor
from pyro_bmr.arguments.checks import read_keywords
from pyro_bmr.programs.batches import Batches
from pyro_bmr.programs.data import Arguments, convert_data

_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler)


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows that are read a batch at a time; ``batches`` holds a few of them, as an example.

    ``indices`` are those of the rows in the dataset.
    """

    loader: DataLoader[Any]
    indices: Sequence[int]
    batches: Batches

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return len(self.loader)

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        """Go through the batches of the loader, in its order."""
        return (self._take(batch) for batch in self.loader)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Read rows, which are numbered from 0, in this process."""
        chosen = [self.loader.dataset[self.indices[i]] for i in rows.tolist()]
        return self._take(self.loader.collate_fn(chosen))

    def _take(self, batch: Any) -> tuple[Tensor, ...]:
        args, kwargs = _split(batch)
        parts = dict(enumerate(args)) | kwargs
        like = self.batches.tensors
        if parts.keys() != like.keys():
            msg = (
                f"got a batch of {sorted(map(str, parts))}, and before one of "
                f"{sorted(map(str, like))}. Expected the same in all batches"
            )
            raise ValueError(msg)
        return tuple(_cast(parts[key], key, tensor) for key, tensor in like.items())


@dataclass(frozen=True, eq=False)
class Data:
    """The arguments of a program; of a stream, an example of them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stream: Stream | None = None


def read_rows(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any, batch_size: int | None = None
) -> Data:
    """Read data as `convert_data` does, or a loader or a dataset of torch."""
    if not any(isinstance(one, DataLoader | Dataset) for one in args):
        return Data(*convert_data(model, guide, args, kwargs))
    found = _read_stream(model, guide, args, kwargs, batch_size)
    if isinstance(found, Stream):
        return Data(found.batches.args, found.batches.kwargs, found)
    return Data(*found)


def _read_stream(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any, batch_size: int | None
) -> Stream | Arguments:
    """Read a loader or a dataset; as tensors where they are in memory, or are all one batch."""
    keywords = read_keywords(kwargs)
    if len(args) != 1 or any(isinstance(one, Tensor) for one in keywords.values()):
        kinds = [type(one).__name__ for one in (*args, *keywords.values())]
        msg = (
            f"got {kinds}. Expected a DataLoader or a Dataset alone, which gives all that has a "
            "row for each observation: tuples are arguments of the model, mappings its keywords"
        )
        raise ValueError(msg)
    (given,) = args
    dataset: Any = given.dataset if isinstance(given, DataLoader) else given
    _check_dataset(dataset)
    if isinstance(given, TensorDataset):
        return convert_data(model, guide, given.tensors, keywords)
    if isinstance(given, DataLoader):
        if batch_size is not None:
            msg = (
                f"got batch_size={batch_size} beside a DataLoader, which has a size of its own. "
                "Expected one of the two: DataLoader(dataset, batch_size=...)"
            )
            raise ValueError(msg)
        loader, indices = given, _find_indices(given)
    else:
        loader = DataLoader(dataset, batch_size or len(dataset), shuffle=batch_size is not None)
        indices = range(len(dataset))
    with torch.random.fork_rng():
        first, *others = (_split(batch) for batch in islice(loader, 2))
    data, names = convert_data(model, guide, *_join(first, others))
    size = len(_tensors(convert_data(model, guide, *first))[0])
    if not isinstance(given, DataLoader) and batch_size is None:
        return data, {**names, **keywords}
    batches = Batches(data, {**names, **keywords}, size, len(indices))
    _check_tensors(data, names)
    return Stream(loader, indices, batches)


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        msg = (
            f"got a {type(dataset).__name__}, whose rows are not counted, so that a batch cannot "
            "stand for all of them. Expected a Dataset with __len__ and __getitem__; or train by "
            "pyro.infer.SVI, with the likelihood scaled by rows / batch"
        )
        raise TypeError(msg)
    if not len(dataset):
        msg = f"got a {type(dataset).__name__} without any rows. Expected one row or more"
        raise ValueError(msg)


def _find_indices(loader: DataLoader[Any]) -> Sequence[int]:
    """Find the rows of the dataset that a loader gives with equal probabilities."""
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:
        told, expected = "without batches", "DataLoader(dataset, batch_size=...)"
    elif not isinstance(loader.sampler, _SAMPLERS):
        told = f"with a {type(loader.sampler).__name__}, whose rows may not be equally probable"
        expected = "shuffle=True, or a SubsetRandomSampler"
    else:
        chosen = getattr(loader.sampler, "indices", None)
        return range(len(dataset)) if chosen is None else [int(i) for i in chosen]
    msg = f"got a DataLoader {told}. Expected {expected}"
    raise ValueError(msg)


def _split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as arguments and keywords of a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def _join(
    first: tuple[tuple[Any, ...], dict[str, Any]], others: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put batches after each other."""

    def join(parts: Sequence[Any]) -> Any:
        whole = all(isinstance(part, Tensor) and part.dim() for part in parts)
        return torch.cat(list(parts)) if whole else parts[0]

    batches = [first, *others]
    args = tuple(map(join, zip(*(args for args, _ in batches), strict=True)))
    return args, {key: join([kwargs[key] for _, kwargs in batches]) for key in first[1]}


def _tensors(data: Arguments) -> list[Tensor]:
    return [one for one in (*data[0], *data[1].values()) if isinstance(one, Tensor)]


def _check_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    parts = dict(enumerate(args)) | dict(kwargs)
    others = {key: type(one).__name__ for key, one in parts.items() if not isinstance(one, Tensor)}
    if others:
        msg = (
            f"got batches that hold {others}, by position or name. Expected tensors, or tuples or "
            "mappings of such: let the dataset, or collate_fn=, make them"
        )
        raise ValueError(msg)


def _cast(value: Any, key: int | str, like: Tensor) -> Tensor:
    if is_array(value):
        value = to_tensor(value, f"argument {key!r}", like.dtype, like.device)
    return value.to(like.device, like.dtype, non_blocking=True)
