"""`reduce_files`: Bayesian model reduction of a posterior that does not fit into memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_kind,
    check_path,
    check_switch,
    read_mapping,
    refuse,
    refuse_kind,
    show,
)
from pyro_bmr.display import progress_bar
from pyro_bmr.files.whole_files import replace_file
from pyro_bmr.mathematics.evidence import delta_f_spike
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.selection.selections import ByEvidence, Selection, TopK, by_evidence
from pyro_bmr.shards.layout import SPREADS, StoredSite, StoredTensor, find_sites
from pyro_bmr.shards.masks import pack, read_about, unpack, write_masks
from pyro_bmr.shards.rules import Rule, find_lowest

# Elements that are looked at together, a multiple of eight.
_CHUNK = 1 << 19
_COLUMNS = ["file", "shape", "elements", "kept", "delta_f"]


def reduce_files(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    prior: Any,
    names: Mapping[str, str] | None = None,
    select: Selection | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Reduce an independent Gaussian posterior in files of safetensors, a chunk at a time.

    .. math:: \Delta F_i = \ln p(\theta_i = 0) - \ln q(\theta_i = 0)

    as `reduce` without data does it for a guide in memory, in less than half a gigabyte whatever
    the size. For each shard there is a copy in ``out`` in which pruned elements are zero, with all
    that the shard holds beside the posterior, and a file of masks, for `read_masks`. What was
    written is not written again, so that a run that was stopped goes on.

    Parameters
    ----------
    paths : path or sequence of path
        The shards.
    out : path
        A folder for what is written, another one than that of the shards.
    prior : Normal or callable
        The prior of every element, of one location and one scale; or a function from the name of a
        site to it.
    names : mapping, optional
        The patterns of the names of tensors, ``{}`` for that of a site: of ``location``, and of
        ``scale``, ``log_scale``, ``variance`` or ``precision``. By default
        ``{"location": "{}.loc", "scale": "{}.scale"}``.
    select : callable, optional
        `by_evidence` (the default) or `top_k`, which need to see no two elements together.
    progress : bool
        Show a progress bar, if there is a terminal or a notebook.

    Returns
    -------
    DataFrame
        By site: its ``file`` and ``shape``, the number of its ``elements`` and of those ``kept``,
        and ``delta_f`` in nats, the sum over those that go.

    Raises
    ------
    FileNotFoundError, ValueError
        If a shard is missing or truncated, or a tensor without a partner, before anything is
        written; if a number is not finite or a scale not positive; if ``out`` has results of other
        shards or settings.

    References
    ----------
    Friston, Parr & Zeidman (2018), arXiv:1805.07092, eq. 10, as the reduced variance goes to zero.

    Examples
    --------
    >>> import tempfile, pyro.distributions as dist
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> tensors = {"w.loc": torch.tensor([0.0, 0.5, 2.0]), "w.scale": torch.tensor([0.1, 0.5, 0.5])}
    >>> save_file(tensors, folder / "part-1.safetensors")
    >>> table = reduce_files(folder / "part-1.safetensors", folder / "out", prior=dist.Normal(0, 1))
    >>> table.loc["w", ["elements", "kept"]].tolist()
    [3, 1]
    >>> from pyro_bmr import read_masks
    >>> read_masks(folder / "out" / "part-1.masks.safetensors")["w"]
    tensor([False, False,  True])
    """
    shards, folder = _read_paths(paths), _read_folder(out)
    if folder.resolve() in {p for s in shards for p in (s.resolve().parent, s.parent.resolve())}:
        refuse("out", str(folder), "another folder than that of the shards")
    select = by_evidence() if select is None else select
    check_switch("progress", progress)
    sites = find_sites(shards, _read_names(names))
    log_priors = {site.name: _log_prior(prior, site.name) for site in sites}
    job = _Job(shards, sites, log_priors, folder, select)
    with progress_bar("elements", progress) as bar:
        task = bar.add_task("reducing", total=job.work, note="")
        rows = job.run(partial(bar.advance, task))
    return pd.DataFrame(rows).set_index("site")[_COLUMNS]


@dataclass(frozen=True)
class _Job:
    shards: Sequence[Path]
    sites: Sequence[StoredSite]
    log_priors: Mapping[str, float]
    folder: Path
    select: Selection

    @property
    def work(self) -> int:
        """How many elements are looked at, all passes together."""
        passes = 2
        if isinstance(self.select, TopK):
            passes += 8 * self._dtype.itemsize // 16
        return passes * sum(site.size for site in self.sites)

    def run(self, advance: Callable[[int], None]) -> list[dict[str, Any]]:
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

    @property
    def _dtype(self) -> torch.dtype:
        dtype = torch.float32
        for site in self.sites:
            dtype = torch.promote_types(dtype, site.dtype)
        return dtype

    @property
    def _settings(self) -> dict[str, Any]:
        stats = {shard: shard.stat() for shard in self.shards}
        return {
            "shards": [[s.name, one.st_size, one.st_mtime_ns] for s, one in stats.items()],
            "sites": [[s.name, s.location.key, s.width.key, s.spread] for s in self.sites],
            "log priors": dict(self.log_priors),
            "select": repr(self.select),
        }

    def _masks_path(self, shard: Path) -> Path:
        return self.folder / _masks_name(shard)

    def _find_about(self, shard: Path) -> Any:
        """Read what was said about the masks of a shard that are written already."""
        path = self._masks_path(shard)
        if not path.exists():
            return None
        about = read_about(path)
        if about is None or about["settings"] != self._settings:
            msg = (
                f"{path} is of other shards or settings. Expected those it was made with, or "
                "another folder"
            )
            raise ValueError(msg)
        return about

    def _make_rule(self, advance: Callable[[int], None]) -> Rule:
        if isinstance(self.select, ByEvidence):
            return Rule(-self.select.margin)
        if isinstance(self.select, TopK):
            count = sum(site.size for site in self.sites) - self.select.n
            return find_lowest(partial(self._stream_all, advance), max(0, count))
        msg = (
            f"got select={show(self.select)}. Expected by_evidence() or top_k(n), which look at "
            "each element by itself"
        )
        raise TypeError(msg)

    def _stream_all(self, advance: Callable[[int], None]) -> Iterator[Tensor]:
        for site in self.sites:
            yield from self._stream(site, advance)

    def _stream(self, site: StoredSite, advance: Callable[[int], None]) -> Iterator[Tensor]:
        """Yield ΔF of each element, a chunk at a time."""
        to_scale, log_prior = SPREADS[site.spread].to_scale, self.log_priors[site.name]
        pairs = zip(*(t.map().split(_CHUNK) for t in (site.location, site.width)), strict=True)
        for number, (loc, width) in enumerate(pairs):
            scale = to_scale(width.to(self._dtype))
            wrong = ~(loc.isfinite() & scale.isfinite() & (scale > 0))
            if wrong.any():
                index = int(wrong.nonzero()[0, 0])
                place = np.unravel_index(number * _CHUNK + index, site.location.shape)
                msg = (
                    f"{site.name} has the location {float(loc[index])} and the {site.spread} "
                    f"{float(width[index])} at {tuple(map(int, place))} in {site.location.path}. "
                    "Expected finite numbers, and positive scales"
                )
                raise ValueError(msg)
            posterior = Diagonal(loc.to(self._dtype), scale)
            yield delta_f_spike(
                posterior, torch.tensor(log_prior, dtype=torch.float64, device="cpu")
            )
            advance(len(loc))

    def _mask(
        self, shard: Path, rule: Rule, advance: Callable[[int], None]
    ) -> tuple[dict[str, Any], Rule]:
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
        about = {"rows": rows, "settings": self._settings, "ties left": rule.ties}
        write_masks(self._masks_path(shard), packed, about)
        return about, rule

    def _zero(self, shard: Path, advance: Callable[[int], None]) -> None:
        """Copy a shard, and write zeros to what goes."""
        with replace_file(self.folder / shard.name) as unfinished:
            shutil.copyfile(shard, unfinished)
            for site in self.sites:
                if shard not in {site.location.path, site.width.path}:
                    continue
                packed = StoredTensor(
                    self._masks_path(site.location.path), site.name, torch.uint8, ()
                ).map()
                for tensor, zero in (
                    (site.location, 0.0),
                    (site.width, SPREADS[site.spread].at_zero),
                ):
                    if tensor.path == shard:
                        _write(tensor.map_to_write(unfinished), packed, zero)
                if site.location.path == shard:
                    advance(site.size)


def _write(values: Tensor, packed: Tensor, zero: float) -> None:
    """Write to the elements that a mask of bits drops."""
    for chunk, bits in zip(values.split(_CHUNK), packed.split(_CHUNK // 8), strict=True):
        chunk[~unpack(bits, len(chunk))] = zero


def _log_prior(prior: Any, name: str) -> float:
    """Compute ln p(0) in nats."""
    if callable(prior) and not isinstance(prior, torch.distributions.Distribution):
        prior = prior(name)
    check_kind("prior", prior, torch.distributions.Normal, "a Normal, such as Normal(0, 1)")
    if prior.batch_shape.numel() != 1:
        refuse("prior", prior, f"one location and one scale for all of {name}")
    loc, scale = prior.loc.double(), prior.scale.double()
    return float(torch.distributions.Normal(loc, scale).log_prob(torch.zeros_like(loc)))


def _read_paths(paths: Any) -> tuple[Path, ...]:
    some = [paths] if isinstance(paths, str | PathLike) else paths
    if not isinstance(some, Sequence) or not some:
        refuse_kind("paths", paths, "the paths of one file or more")
    for path in some:
        check_path(path, "paths")
    shards = tuple(map(Path, some))
    written = {shard.name for shard in shards} | {_masks_name(shard) for shard in shards}
    if len(written) < 2 * len(shards):
        names = [str(shard) for shard in shards]
        refuse("paths", names, "files of names that differ but for their endings, and are no masks")
    return shards


def _masks_name(shard: Path) -> str:
    return f"{shard.stem}.masks.safetensors"


def _read_folder(out: Any) -> Path:
    check_path(out, "out")
    if Path(out).exists() and not Path(out).is_dir():
        refuse("out", str(out), "a folder")
    return Path(out)


def _read_names(names: Any) -> dict[str, str]:
    expected = f"patterns with one {{}} of location and of one of {', '.join(SPREADS)}"
    read = read_mapping("names", names, expected) or {"location": "{}.loc", "scale": "{}.scale"}
    fits = len(read) == 2 and "location" in read and read.keys() <= {"location", *SPREADS}
    fits = fits and len(set(read.values())) == 2
    if not fits or any(not isinstance(p, str) or p.count("{}") != 1 for p in read.values()):
        refuse("names", names, expected)
    return read
