"""Where the tensors of a posterior are among files, found without reading their numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.display import warn
from pyro_bmr.files.whole_files import check_file


@dataclass(frozen=True)
class Spread:
    """What a file says of how wide an element is: as a scale, and where the element is zero."""

    to_scale: Callable[[Tensor], Tensor]
    at_zero: float


SPREADS: Mapping[str, Spread] = {
    "scale": Spread(lambda scale: scale, 0.0),
    "log_scale": Spread(torch.exp, -torch.inf),
    "variance": Spread(torch.sqrt, 0.0),
    "precision": Spread(torch.rsqrt, torch.inf),
}

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of safetensors: the file's word for its dtype, and where its bytes are."""

    path: Path
    key: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """One of those that a posterior may have."""
        return _DTYPES[self.kind]

    def read(self, count: int) -> Iterator[Tensor]:
        """Yield all elements in a row, so many at a time."""
        for part in self._map(self.path, shared=False).split(count * self.dtype.itemsize):
            # Bytes may begin anywhere in a file, but numbers only at multiples of their size.
            yield part.clone().view(self.dtype)

    def map_to_write(self, path: Path) -> np.ndarray[Any, Any]:
        """Return the elements in a copy of the file, to write what `to_bytes` makes."""
        return self._map(path, shared=True).numpy().view(f"V{self.dtype.itemsize}")

    def to_bytes(self, number: float) -> np.ndarray[Any, Any]:
        """Return one element that is a number."""
        one = torch.tensor([number], dtype=self.dtype, device="cpu").view(torch.uint8)
        return one.numpy().view(f"V{self.dtype.itemsize}")

    def _map(self, path: Path, shared: bool) -> Tensor:
        """Map bytes, which are read from the disk as they are looked at."""
        return torch.from_file(str(path), shared, self.stop, dtype=torch.uint8)[self.start :]


@dataclass(frozen=True)
class StoredSite:
    """The posterior of a site: its locations and, as ``spread`` names it, how wide it is."""

    name: str
    location: StoredTensor
    width: StoredTensor
    spread: str

    @property
    def size(self) -> int:
        """How many elements it has."""
        return torch.Size(self.location.shape).numel()


def find_sites(paths: Sequence[Path], names: Mapping[str, str]) -> list[StoredSite]:
    """Find the sites in files, in the order of the files, and of their names within one.

    ``names`` has the patterns of ``location`` and of one of the `SPREADS`.
    """
    (spread,) = names.keys() - {"location"}
    tensors = [tensor for path in paths for tensor in _list_tensors(path)]
    twice = [key for key, count in Counter(t.key for t in tensors).items() if count > 1]
    if twice:
        refuse("paths", twice, "each tensor in one file")
    found = _match(names, tensors)
    locations, widths = found["location"], found[spread]
    if not locations and not widths:
        have = [tensor.key for tensor in tensors[:8]]
        refuse("names", dict(names), f"a location and a {spread} for each site; found {have}")
    paired = locations.keys() & widths.keys()
    for kind, other in (("location", spread), (spread, "location")):
        alone = [tensor.key for name, tensor in found[kind].items() if name not in paired]
        if alone and not (paired and _fit(names[kind], names[other])):
            refuse("names", dict(names), f"a {other} for each {kind}; {alone[:8]} have none")
        if alone:
            warn(f"{alone[:8]} have no {other} and stay as they are, {len(alone)} in all")
    order = {path: number for number, path in enumerate(paths)}
    in_order = sorted(paired, key=lambda name: (order[locations[name].path], name))
    sites = [StoredSite(name, locations[name], widths[name], spread) for name in in_order]
    for site in sites:
        _check(site)
    return sites


def _list_tensors(path: Path) -> Iterator[StoredTensor]:
    try:
        # Whether the file is whole is seen when it is opened.
        with safe_open(check_file(path), "pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        msg = f"{path} is not there. Expected all shards; nothing was written"
        raise FileNotFoundError(msg) from error
    except SafetensorError as error:
        msg = f"{path} is no whole file of safetensors ({error}). Expected one; nothing was written"
        raise ValueError(msg) from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        yield StoredTensor(path, key, entry["dtype"], tuple(entry["shape"]), start, stop)


def _match(
    names: Mapping[str, str], tensors: Iterable[StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """Find the tensors of each kind, by site; what fits both patterns is of the longer one."""
    kinds = sorted(names, key=lambda kind: len(names[kind]), reverse=True)
    found: dict[str, dict[str, StoredTensor]] = {kind: {} for kind in kinds}
    for tensor in tensors:
        for kind in kinds:
            name = _fit(names[kind], tensor.key)
            if name:
                found[kind][name] = tensor
                break
    return found


def _fit(pattern: str, key: str) -> str:
    """Return what ``{}`` stands for in a name, nothing if that does not fit."""
    before, after = pattern.split("{}")
    fits = key.startswith(before) and key.endswith(after)
    return key[len(before) : len(key) - len(after)] if fits else ""


def _check(site: StoredSite) -> None:
    """Raise a ValueError if a site cannot be reduced."""
    for tensor in (site.location, site.width):
        if tensor.kind not in _DTYPES:
            msg = (
                f"{tensor.key} in {tensor.path} has the dtype {tensor.kind}. Expected one of "
                f"{', '.join(_DTYPES)} for a location and a {site.spread}; nothing was written"
            )
            raise ValueError(msg)
    if site.location.shape != site.width.shape:
        shapes = {site.location.key: site.location.shape, site.width.key: site.width.shape}
        refuse("paths", shapes, f"a location and a {site.spread} of one shape")
