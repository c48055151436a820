"""Processes that train or reduce one guide together, each on rows of its own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from pyro_bmr.arguments.checks import check_choice, refuse, refuse_kind
from pyro_bmr.display import warn
from pyro_bmr.programs.fingerprints import fingerprint
from pyro_bmr.programs.own_names import shared_name

_T = TypeVar("_T")
_E = TypeVar("_E", bound=Exception)
_OF_ALL = "_of_all_ranks"
_SAME = "the same model, guide, options and version of torch in all ranks"


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a process group, of which this process is one; a single one without a group.

    All of them call the same methods in the same order, until something goes wrong. ``noise`` says
    whether they draw ``"own"`` numbers or the ``"same"``; both come from the ``generator``, which
    is where it is in all.
    """

    group: Any = None
    rank: int = 0
    size: int = 1
    noise: str = "own"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator("cpu"))

    @property
    def are_many(self) -> bool:
        """Whether there is a group, be it of one."""
        return self.group is not None

    @property
    def is_first(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """What says where noise goes on."""
        return (self.generator,) if self.are_many else ()

    def own_noise(self, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Leave torch's generators as they are, for they are set in each epoch."""
        devices = {p.device for p in parameters.values() if p.device.type == "cuda"}
        return torch.random.fork_rng(sorted(devices, key=str), enabled=self.are_many)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of one rank be that of all, which are here, or wait in `gather`."""
        try:
            yield
        except Exception as error:
            if not _is_of_all(error):
                self.raise_first(error)
            raise
        else:
            self.raise_first(None)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Take an error for that of all, of what sees to that itself."""
        try:
            yield
        except Exception as error:
            _of_all(error)
            raise

    def raise_first(self, error: Exception | None) -> None:
        """Raise what went wrong in the first rank in which something did."""
        self.gather(None, error=error)

    def gather(self, value: _T, what: str = "", error: Exception | None = None) -> list[_T]:
        """Return the value of each rank, or raise what went wrong in the first in which it did.

        Ranks that gather other things, as ``what`` says, have parted ways: a RuntimeError.
        """
        if not self.are_many:
            return [value]
        found: list[Any] = [None] * self.size
        told = None if error is None else (_find_kind(error), str(error))
        distributed.all_gather_object(found, (told, what, value), group=self.group)
        for rank, (one, _, _) in enumerate(found):
            if one is not None:
                msg = f"rank {rank} of {self.size}: {one[1]}"
                raise _of_all(pickle.loads(one[0])(msg)) from error
        things = [one for _, one, _ in found]
        if len(set(things)) > 1:
            msg = f"ranks have parted ways: they come with {things}. Expected {_SAME}"
            raise _of_all(RuntimeError(msg))
        return [one for _, _, one in found]

    def gather_rows(self, count: int) -> list[int]:
        """Return how many rows each rank has, two or more."""
        rows = self.gather(count, "rows")
        if min(rows) < 2:
            msg = f"got {rows} rows in the ranks of the mesh. Expected two or more in each"
            raise _of_all(ValueError(msg))
        return rows

    def check_no_loader(self, loader: Any) -> None:
        """Raise a TypeError if rows come from a loader."""
        if self.are_many and loader is not None:
            msg = "got a loader and a mesh. Expected tensors of the rows of this rank with a mesh"
            raise TypeError(msg)

    def give(self, value: _T) -> _T:
        """Return the value of the first rank."""
        return self.gather(value)[0]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Average tensors of one device over the ranks, all in one message."""
        if not self.are_many:
            return tensors
        dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
        whole = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
        distributed.all_reduce(whole, group=self.group)
        whole /= self.size
        parts = whole.split([tensor.numel() for tensor in tensors])
        return [one.view(t.shape).to(t.dtype) for one, t in zip(parts, tensors, strict=True)]

    def average_all(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Average tensors over the ranks; an error of one of them is raised in all."""
        if not (self.are_many and tensors):
            return tensors
        self.gather(None, "an average")
        return self.average(tensors)

    def start_noise(self) -> None:
        """Let noise begin at the same place in all ranks, where torch's generator of the first is.

        Nothing where there is one.
        """
        if self.are_many:
            seed = int(torch.randint(2**62, (), device="cpu"))
            self.generator.manual_seed(self.give(seed))

    @torch.no_grad()
    def start(self, parameters: dict[str, Tensor]) -> None:
        """Let all ranks begin at the parameters of the first."""
        if not self.are_many:
            return
        described = {shared_name(n): f"{p.dtype} {tuple(p.shape)}" for n, p in parameters.items()}
        self.check_same("parameters", described)
        first = distributed.get_global_rank(self.group, 0)
        for parameter in parameters.values():
            distributed.broadcast(parameter, src=first, group=self.group)

    def draw_seeds(self) -> tuple[int, int]:
        """Return seeds for the order of rows, another one in each rank, and for noise."""
        order, noise = torch.randint(2**48, (2,), generator=self.generator, device="cpu").tolist()
        return order + self.rank, noise + (self.rank if self.noise == "own" else 0)

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise a RuntimeError where something is not the same in all ranks."""
        first, *others = self.gather(values, what)
        for rank, other in enumerate(others, 1):
            names = _find_different(first, other)
            if names:
                told = "; ".join(f"{n}: {first.get(n)} and {other.get(n)}" for n in names)
                msg = f"ranks 0 and {rank} have different {what}, {told}. Expected {_SAME}"
                raise _of_all(RuntimeError(msg))

    def check_values(
        self,
        values: Mapping[str, Any],
        what: str = "values of parameters",
        expected: str = _SAME,
    ) -> None:
        """Raise a RuntimeError where tensors or numbers are not the same, to the last bit."""
        if not self.are_many:
            return
        first, *others = self.gather(
            {shared_name(n): _to_bits(one) for n, one in values.items()}, what
        )
        for rank, other in enumerate(others, 1):
            names = _find_different(first, other)
            if names:
                msg = f"ranks 0 and {rank} have different {what} {names}. Expected {expected}"
                raise _of_all(RuntimeError(msg))


ONE = Ranks()


def read_ranks(mesh: Any, noise: Any = "own", verb: str = "fit") -> Ranks:
    """Read who takes part, and warn of processes that know nothing of each other."""
    check_choice("noise", noise, ("own", "same"))
    if mesh is None:
        _warn_of_others(verb)
        return ONE
    if not all(hasattr(mesh, name) for name in ("get_group", "get_local_rank", "ndim")):
        refuse_kind("mesh", mesh, "a torch.distributed.device_mesh.DeviceMesh, or None")
    if mesh.ndim != 1:
        refuse("mesh", mesh, "a mesh of one dimension, such as mesh['data'] of one with more")
    return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size(), noise)


def _warn_of_others(verb: str) -> None:
    count = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
    if count > 1:
        does = "trains" if verb in {"fit", "prune"} else "measures"
        warn(
            f"this is one of {count} processes, and {does} by itself, on its own rows alone. "
            f"Expected {verb}(..., mesh=init_device_mesh('cpu', (count,))) for all rows together"
        )


def _of_all(error: _E) -> _E:
    """Mark an error as one that all ranks raise."""
    setattr(error, _OF_ALL, True)
    return error


def _is_of_all(error: BaseException | None) -> bool:
    """Tell whether all ranks raise an error, or what it came from."""
    while error is not None:
        if hasattr(error, _OF_ALL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _find_different(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(n for n in first.keys() | other.keys() if first.get(n) != other.get(n))


def _to_bits(value: Any) -> Any:
    """Describe tensors or numbers so that NaN is itself."""
    if isinstance(value, list):
        return [_to_bits(one) for one in value]
    return fingerprint(value) if isinstance(value, Tensor) else repr(value)


def _find_kind(error: Exception) -> bytes:
    """Return the type of an error, or RuntimeError where others could not make one like it."""
    try:
        type(error)("")
        return pickle.dumps(type(error))
    except Exception:
        return pickle.dumps(RuntimeError)
