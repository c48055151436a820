"""Data that need not fit into memory: a loader of torch, or a dataset, read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
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
from pyro_bmr.display import a_or_an
from pyro_bmr.programs.batches import Batches
from pyro_bmr.programs.data import Arguments, convert_data
from pyro_bmr.programs.dry_run import dry_run

_SAMPLERS = {SequentialSampler, RandomSampler, SubsetRandomSampler}


@dataclass(frozen=True, eq=False)
class Stream:
    """Rows that are read a batch at a time; ``batches`` holds a few of them, as an example.

    ``indices`` are those of the rows in the dataset; ``kinds`` what is in the columns of a batch.
    """

    loader: DataLoader[Any]
    indices: Sequence[int]
    batches: Batches
    kinds: Mapping[int | str, str]

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return len(self.loader)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of its own that a loader shuffles with."""
        given = [self.loader.generator, getattr(_sampler(self.loader), "generator", None)]
        return [one for i, one in enumerate(given) if one is not None and one not in given[:i]]

    @property
    def facts(self) -> tuple[Any, ...]:
        """What tells the batches from those of another loader."""
        size, rows = self.batches.batch_size, self.batches.size
        return rows, size, len(self), type(_sampler(self.loader)).__name__

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        """Go through the batches of the loader, in its order."""
        return map(self._take, self._batches())

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Read rows, which are numbered from 0, in this process."""
        return self._take(_collate(self.loader, [self.indices[i] for i in rows.tolist()]))

    def _batches(self) -> Iterator[Any]:
        left = len(self)
        with _reading(self.loader):
            for batch in self.loader:
                left -= 1
                if left < 0:
                    break
                yield batch
        if left:
            msg = (
                f"got {'more' if left < 0 else len(self) - left} batches in an epoch, and "
                f"{len(self)} by len(loader). Expected a loader with the length that it says"
            )
            raise ValueError(msg)

    def _take(self, batch: Any) -> tuple[Tensor, ...]:
        tensors = _read_tensors(batch)
        _check_kinds(tensors, self.kinds)
        return tuple(
            tensors[key].to(like.device, like.dtype, non_blocking=True)
            for key, like in self.batches.tensors.items()
        )


@dataclass(frozen=True, eq=False)
class Data:
    """The arguments of a program; of a stream, an example of them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stream: Stream | None = None


def read_stream_or_data(
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
    size, rows = min(_batch_sampler(loader).batch_size, len(indices)), len(indices)
    # Always the same ones, so that one run can be told from another: the first, and some of all.
    count = min(size, rows - size)
    others = torch.linspace(size, rows - 1, count, dtype=torch.float64, device="cpu")
    with dry_run():
        pyro.set_rng_seed(0)
        batch = _collate(loader, [indices[i] for i in [*range(size), *others.long().tolist()]])
    tensors = _read_tensors(batch)
    data, names = convert_data(model, guide, *_split(batch))
    if not isinstance(given, DataLoader) and batch_size is None:
        return data, {**names, **keywords}
    batches = Batches(data, {**names, **keywords}, size, rows)
    return Stream(loader, indices, batches, {key: _kind(tensors[key]) for key in batches.tensors})


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        msg = (
            f"got {a_or_an(dataset)}, whose rows are not counted, so that a batch cannot "
            "stand for all of them. Expected a Dataset with __len__ and __getitem__; or train by "
            "pyro.infer.SVI, with the likelihood scaled by rows / batch"
        )
        raise TypeError(msg)
    if not len(dataset):
        msg = f"got {a_or_an(dataset)} without any rows. Expected one row or more"
        raise ValueError(msg)


def _batch_sampler(loader: DataLoader[Any]) -> Any:
    return loader.batch_sampler


def _sampler(loader: DataLoader[Any]) -> Any:
    return _batch_sampler(loader).sampler


def _find_indices(loader: DataLoader[Any]) -> Sequence[int]:
    """Find the rows of the dataset that a loader gives with equal probabilities."""
    batches = _batch_sampler(loader)
    kind = type(getattr(batches, "sampler", None))
    if batches is None:
        told, expected = "without batches", "DataLoader(dataset, batch_size=...)"
    elif type(batches) is not BatchSampler:
        told = f"with {a_or_an(batches)}, whose rows may not be equally probable"
        expected = "batch_size= and shuffle=True; or write the loop over pyro.infer.SVI.step"
    elif kind not in _SAMPLERS:
        told = f"with a {kind.__name__}, whose rows may not be equally probable"
        expected = "shuffle=True, or a SubsetRandomSampler"
    else:
        sampler, size = _sampler(loader), batches.batch_size
        chosen = getattr(sampler, "indices", None)
        indices = range(len(sampler.data_source)) if chosen is None else [int(i) for i in chosen]
        if not len(loader):
            told = f"of {len(indices)} rows that makes no batch of {size}"
            expected = "one row or more, and drop_last=False or a smaller batch_size"
        elif batches.drop_last and kind is SequentialSampler and len(indices) % size:
            told = "with drop_last=True and without shuffling, so that the last rows are never read"
            expected = "shuffle=True, or drop_last=False"
        else:
            return indices
    msg = f"got a DataLoader {told}. Expected {expected}"
    raise ValueError(msg)


@contextmanager
def _reading(loader: DataLoader[Any]) -> Iterator[None]:
    """Explain why rows cannot be read, or put together, where torch or the dataset fails."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        msg = (
            f"got rows of {a_or_an(loader.dataset)} that make no batch "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Expected tensors, "
            "arrays or numbers from every row, as many and of the same shapes and names, or a "
            "collate_fn= that makes them so"
        )
        raise ValueError(msg) from error


def _collate(loader: DataLoader[Any], indices: Iterable[int]) -> Any:
    """Make a batch of rows of the dataset, in this process."""
    with _reading(loader):
        return loader.collate_fn([loader.dataset[i] for i in indices])


def _split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as arguments and keywords of a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def _read_tensors(batch: Any) -> dict[int | str, Tensor]:
    """Return what is in a batch, by position or name; an error if there are no rows of numbers."""
    args, kwargs = _split(batch)
    parts = dict(enumerate(args)) | kwargs
    tensors = {
        key: to_tensor(one, f"argument {key!r}", torch.float64, None) if is_array(one) else one
        for key, one in parts.items()
    }
    others = {key: type(v).__name__ for key, v in tensors.items() if not isinstance(v, Tensor)}
    if others or not tensors:
        msg = (
            f"got batches that hold {others}, by position or name. Expected tensors, or tuples or "
            "mappings of such: let the dataset, or collate_fn=, make them"
        )
        raise ValueError(msg)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if len({shape[:1] for shape in shapes.values()}) != 1 or () in shapes.values():
        msg = (
            f"got a batch of shapes {shapes}, by position or name. Expected one row per "
            "observation in each, the same number in all"
        )
        raise ValueError(msg)
    return tensors


def _check_kinds(tensors: Mapping[int | str, Tensor], kinds: Mapping[int | str, str]) -> None:
    found = {key: _kind(tensor) for key, tensor in tensors.items()}
    if found != kinds:
        msg = (
            f"got a batch of {found}, by position or name, and before one of {dict(kinds)}. "
            "Expected the same in all: return the same type from every row, for example float(y)"
        )
        raise ValueError(msg)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "bool" if tensor.dtype == torch.bool else "complex" if tensor.is_complex() else "int"
