"""Processes that train one guide together, each on rows of its own."""

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

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a process group, of which this process is one; a single one without a group.

    All of them call the same methods in the same order. ``noise`` says whether they draw ``"own"``
    numbers or the ``"same"``; both come from the ``generator``, which is where it is in all.
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
        """Let an error of one rank, where none waits for another, be that of all."""
        try:
            yield
        except Exception as error:
            self.raise_first(error)
            raise
        else:
            self.raise_first(None)

    def raise_first(self, error: Exception | None) -> None:
        """Raise what went wrong in the first rank in which something did."""
        if not self.are_many:
            return
        found = self.gather(None if error is None else (_find_kind(error), str(error)))
        for rank, one in enumerate(found):
            if one is not None:
                kind, text = pickle.loads(one[0]), one[1]
                msg = f"rank {rank} of {self.size}: {text}"
                raise kind(msg) from error

    def gather(self, value: _T) -> list[_T]:
        """Return the value of each rank."""
        if not self.are_many:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def give(self, value: _T) -> _T:
        """Return the value of the first rank."""
        return self.gather(value if self.is_first else None)[0]  # type: ignore[return-value]

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

    @torch.no_grad()
    def start(self, parameters: dict[str, Tensor]) -> None:
        """Let all ranks begin at the parameters of the first, and at the same place of noise."""
        if not self.are_many:
            return
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.generator.manual_seed(self.give(seed))
        self.check_same(
            "parameters", {n: f"{p.dtype} {tuple(p.shape)}" for n, p in parameters.items()}
        )
        first = distributed.get_global_rank(self.group, 0)
        for parameter in parameters.values():
            distributed.broadcast(parameter, src=first, group=self.group)

    def draw_seeds(self) -> tuple[int, int]:
        """Return seeds for the order of rows, another one in each rank, and for noise."""
        order, noise = torch.randint(2**48, (2,), generator=self.generator, device="cpu").tolist()
        return order + self.rank, noise + (self.rank if self.noise == "own" else 0)

    def check_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise a RuntimeError where something is not the same in all ranks."""
        first, *others = self.gather(values)
        for rank, other in enumerate(others, 1):
            names = [n for n in first.keys() | other.keys() if first.get(n) != other.get(n)]
            if names:
                told = [f"{n}: {first.get(n)} and {other.get(n)}" for n in sorted(names)]
                msg = (
                    f"ranks 0 and {rank} have different {what}, {'; '.join(told)}. Expected the "
                    "same model, guide, options and version of torch in all ranks"
                )
                raise RuntimeError(msg)

    def check_values(self, values: Mapping[str, Tensor]) -> None:
        """Raise a RuntimeError where tensors are not the same in all ranks, to the last bit."""
        if self.are_many:
            self.check_same("values of parameters", {n: fingerprint(p) for n, p in values.items()})


def read_ranks(mesh: Any, noise: Any) -> Ranks:
    """Read who trains, and warn of processes that know nothing of each other."""
    check_choice("noise", noise, ("own", "same"))
    if mesh is None:
        _warn_of_others()
        return Ranks()
    if not all(hasattr(mesh, name) for name in ("get_group", "get_local_rank", "ndim")):
        refuse_kind("mesh", mesh, "a torch.distributed.device_mesh.DeviceMesh, or None")
    if mesh.ndim != 1:
        refuse("mesh", mesh, "a mesh of one dimension, such as mesh['data'] of one with more")
    return Ranks(mesh.get_group(), mesh.get_local_rank(), mesh.size(), noise)


def _warn_of_others() -> None:
    count = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
    if count > 1:
        warn(
            f"this is one of {count} processes, and trains by itself, on its own rows alone. "
            "Expected fit(..., mesh=init_device_mesh('cpu', (count,))) for one training of all"
        )


def _find_kind(error: Exception) -> bytes:
    """Return the type of an error, or RuntimeError where others could not make one like it."""
    try:
        type(error)("")
        return pickle.dumps(type(error))
    except Exception:
        return pickle.dumps(RuntimeError)
