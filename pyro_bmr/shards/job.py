"""The reduction of shards, a chunk at a time: first the masks, and then the copies under them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.files.whole_files import replace_file
from pyro_bmr.mathematics.evidence import delta_f_spike
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.selection.selections import ByEvidence, TopK
from pyro_bmr.shards.layout import SPREADS, StoredSite, StoredTensor
from pyro_bmr.shards.masks import pack, read_about, read_bits, unpack, write_masks
from pyro_bmr.shards.rules import Rule, count_passes, find_lowest

# Elements that are looked at together, a multiple of eight.
_CHUNK = 1 << 19

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """Shards, the sites in them with ln p(0) of each, what selects, and a folder for results."""

    shards: Sequence[Path]
    sites: Sequence[StoredSite]
    log_priors: Mapping[str, float]
    select: ByEvidence | TopK
    folder: Path

    @property
    def work(self) -> int:
        """How many elements are looked at, all passes together."""
        passes = 2 + (count_passes(self._dtype) if isinstance(self.select, TopK) else 0)
        return passes * self._size

    def run(self, advance: Advance) -> list[dict[str, Any]]:
        """Write masks for all shards, and then the shards under them; return rows of the table."""
        done = {shard: self._find_about(shard) for shard in self.shards}
        copies = [str(s) for s in self.shards if (self.folder / s.name).exists()]
        if None in done.values() and copies:
            refuse(
                "out", str(self.folder), f"a folder without {copies}, as masks are missing there"
            )
        rule = self._make_rule(advance) if None in done.values() else Rule(0.0)
        rows: list[dict[str, Any]] = []
        for shard in self.shards:
            about = done[shard]
            if about is None:
                about, rule = self._mask(shard, rule, advance)
            else:
                rule = Rule(rule.threshold, about["ties left"])
            rows += about["rows"]
        for shard in self.shards:
            if not (self.folder / shard.name).exists():
                self._zero(shard, advance)
        return rows

    @cached_property
    def _size(self) -> int:
        return sum(site.size for site in self.sites)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """That of ΔF, one for all sites, so that they can be compared."""
        dtype = torch.float32
        for site in self.sites:
            dtype = torch.promote_types(dtype, site.location.dtype)
        return dtype

    @cached_property
    def _digest(self) -> str:
        """What tells a job from others."""
        stats = {shard: shard.stat() for shard in self.shards}
        settings = {
            "shards": [[s.name, one.st_size, one.st_mtime_ns] for s, one in stats.items()],
            "sites": [[s.name, s.location.key, s.width.key, s.spread] for s in self.sites],
            "log priors": dict(self.log_priors),
            "select": repr(self.select),
        }
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def _find_about(self, shard: Path) -> Any:
        """Read what was said about the masks of a shard that are written already."""
        path = self.folder / masks_name(shard)
        if not path.exists():
            return None
        about = read_about(path)
        if about is None or about.get("job") != self._digest:
            msg = (
                f"{path} is of other shards or settings. Expected those it was made with, or "
                "another folder"
            )
            raise ValueError(msg)
        return about

    def _make_rule(self, advance: Advance) -> Rule:
        if isinstance(self.select, ByEvidence):
            return Rule(-self.select.margin)
        count = max(0, self._size - self.select.n)
        return find_lowest(partial(self._stream_all, advance), count, self._dtype)

    def _stream_all(self, advance: Advance) -> Iterator[Tensor]:
        for site in self.sites:
            yield from self._stream(site, advance)

    def _stream(self, site: StoredSite, advance: Advance) -> Iterator[Tensor]:
        """Yield ΔF of each element, a chunk at a time."""
        to_scale = SPREADS[site.spread].to_scale
        log_prior = torch.tensor(self.log_priors[site.name], dtype=torch.float64, device="cpu")
        pairs = zip(site.location.read(_CHUNK), site.width.read(_CHUNK), strict=True)
        for number, (loc, width) in enumerate(pairs):
            scale = to_scale(width.to(self._dtype))
            wrong = ~(loc.isfinite() & scale.isfinite() & (scale > 0))
            if wrong.any():
                index = int(wrong.nonzero()[0, 0])
                _refuse(site, number * _CHUNK + index, float(loc[index]), float(width[index]))
            yield delta_f_spike(Diagonal(loc.to(self._dtype), scale), log_prior)
            advance(len(loc))

    def _mask(self, shard: Path, rule: Rule, advance: Advance) -> tuple[dict[str, Any], Rule]:
        """Write the masks of the sites whose locations are in a shard."""
        rows, packed = [], {}
        for site in self.sites:
            if site.location.path != shard:
                continue
            kept, total = 0, 0.0
            # Made beforehand: bits that are kept one by one would leave holes in the memory.
            bits = torch.empty(-(-site.size // 8), dtype=torch.uint8, device="cpu")
            places = bits.split(_CHUNK // 8)
            for place, delta_f in zip(places, self._stream(site, advance), strict=True):
                mask, rule = rule.apply(delta_f)
                place.copy_(pack(mask))
                kept += int(mask.sum())
                total += float(delta_f.double()[~mask].sum())
            packed[site.name] = bits
            shape = list(site.location.shape)
            row = {"site": site.name, "file": shard.name, "shape": shape}
            rows.append(row | {"elements": site.size, "kept": kept, "delta_f": total})
        about = {"rows": rows, "job": self._digest, "ties left": rule.ties}
        write_masks(self.folder / masks_name(shard), packed, about)
        return about, rule

    def _zero(self, shard: Path, advance: Advance) -> None:
        """Copy a shard, and write zeros to what goes."""
        sites = [site for site in self.sites if shard in {site.location.path, site.width.path}]
        located = {site.location.path for site in sites}
        bits = {path: read_bits(self.folder / masks_name(path)) for path in located}
        with replace_file(self.folder / shard.name) as unfinished:
            shutil.copyfile(shard, unfinished)
            for site in sites:
                at_zero = {site.location: 0.0, site.width: SPREADS[site.spread].at_zero}
                for tensor, zero in at_zero.items():
                    if tensor.path == shard:
                        _write(tensor, unfinished, bits[site.location.path][site.name], zero)
                if site.location.path == shard:
                    advance(site.size)


def masks_name(shard: Path) -> str:
    """Return the name of the file with the masks of a shard."""
    return f"{shard.stem}.masks.safetensors"


def _write(tensor: StoredTensor, path: Path, bits: Tensor, zero: float) -> None:
    """Write to the elements that a mask of bits drops, in a copy of the file."""
    elements = tensor.map_to_write(path)
    for start in range(0, len(elements), _CHUNK):
        chunk = elements[start : start + _CHUNK]
        np.putmask(chunk, ~unpack(bits[start // 8 :], len(chunk)).numpy(), tensor.to_bytes(zero))


def _refuse(site: StoredSite, index: int, location: float, width: float) -> NoReturn:
    place = tuple(map(int, np.unravel_index(index, site.location.shape)))
    pruned = location == 0 and width == SPREADS[site.spread].at_zero
    advice = ": it was pruned by reduce_files, give the shards that this read" if pruned else ""
    msg = (
        f"{site.name} has the location {location} and the {site.spread} {width} at {place} in "
        f"{site.location.path}. Expected finite numbers, and positive scales{advice}"
    )
    raise ValueError(msg)
