"""Where the tensors of a posterior are among files, found without reading their numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_bmr.arguments.checks import refuse


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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of safetensors."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def map(self) -> Tensor:
        """Return all elements in a row; they are read from the disk as they are looked at."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.key).reshape(-1)

    def map_to_write(self, path: Path) -> Tensor:
        """Return those of a copy of the file, to write to."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start, stop = json.loads(file.read(length))[self.key]["data_offsets"]
        whole = torch.from_file(str(path), True, path.stat().st_size, dtype=torch.uint8)
        return whole[8 + length + start : 8 + length + stop].view(self.dtype)


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

    @property
    def dtype(self) -> torch.dtype:
        """That of ΔF, as precise as the locations or float32."""
        return torch.promote_types(self.location.dtype, torch.float32)


def find_sites(paths: Sequence[Path], names: Mapping[str, str]) -> list[StoredSite]:
    """Find the sites in files, in the order of the files and of their tensors.

    ``names`` has the patterns of ``location`` and of one of the `SPREADS`.
    """
    (spread,) = names.keys() - {"location"}
    tensors = [tensor for path in paths for tensor in _list_tensors(path)]
    twice = [key for key, count in Counter(t.key for t in tensors).items() if count > 1]
    if twice:
        refuse("paths", twice, "each tensor in one file")
    found = {kind: _match(pattern, tensors) for kind, pattern in names.items()}
    locations, widths = found["location"], found[spread]
    alone = sorted(locations.keys() ^ widths.keys())
    if alone or not locations:
        have = f"{alone} with one of them" if alone else f"{[t.key for t in tensors][:8]}"
        refuse("names", dict(names), f"a location and a {spread} for each site; found {have}")
    sites = [StoredSite(name, locations[name], widths[name], spread) for name in locations]
    for site in sites:
        if site.location.shape != site.width.shape:
            shapes = {site.location.key: site.location.shape, site.width.key: site.width.shape}
            refuse("paths", shapes, f"a location and a {spread} of one shape")
    return sites


def _list_tensors(path: Path) -> Iterable[StoredTensor]:
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys()
            for key in keys:
                tensor = file.get_tensor(key)
                yield StoredTensor(path, key, tensor.dtype, tuple(tensor.shape))
    except FileNotFoundError as error:
        msg = f"{path} is not there. Expected all shards; nothing was written"
        raise FileNotFoundError(msg) from error
    except SafetensorError as error:
        msg = f"{path} is no whole file of safetensors ({error}). Expected one; nothing was written"
        raise ValueError(msg) from error


def _match(pattern: str, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    before, after = pattern.split("{}")
    return {
        tensor.key[len(before) : len(tensor.key) - len(after)]: tensor
        for tensor in tensors
        if tensor.dtype.is_floating_point
        and tensor.key.startswith(before)
        and tensor.key.endswith(after)
        and len(tensor.key) > len(before) + len(after)
    }
