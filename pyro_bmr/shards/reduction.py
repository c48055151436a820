"""`reduce_files`: Bayesian model reduction of a posterior that does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributions import Distribution, Normal

from pyro_bmr.arguments.checks import (
    check_function,
    check_kind,
    check_path,
    check_switch,
    read_mapping,
    refuse,
    refuse_kind,
)
from pyro_bmr.display import progress_bar
from pyro_bmr.selection.selections import ByEvidence, Selection, TopK, by_evidence
from pyro_bmr.shards.job import Job, masks_name
from pyro_bmr.shards.layout import SPREADS, find_sites

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["file", "shape", "elements", "kept", "delta_f"]


def reduce_files(
    paths: str | PathLike[str] | Iterable[str | PathLike[str]],
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
    written is not written again, so that a run that was stopped goes on. The copies are for use,
    not for another reduction: a pruned element has no scale.

    Parameters
    ----------
    paths : path or iterable of path
        The shards, in an order. Of elements of equal ΔF, `top_k` drops the first: in the order of
        the shards, in each by the names of sites as ``sorted`` has them (``"b.10"`` before
        ``"b.9"``), whatever the order in the file, and in a site row by row.
    out : path
        A folder for what is written, another one than that of the shards.
    prior : Normal or callable
        The prior of every element, of one location and one scale; or a function from the name of a
        site to it.
    names : mapping, optional
        The patterns of the names of tensors, ``{}`` for that of a site: of ``location``, and of
        ``scale``, ``log_scale``, ``variance`` or ``precision``. By default
        ``{"location": "{}.loc", "scale": "{}.scale"}``. A name that fits both patterns is of the
        longer one, as in ``{"location": "{}", "precision": "{}.precision"}``, by which all else
        that has no partner stays as it is, with a warning.
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
        Before anything is written: if a shard is missing or truncated, a tensor without a partner
        or not of float64, float32, float16 or bfloat16; if ``out`` has results of other shards or
        settings. If a number is not finite or a scale not positive, as in copies that
        `reduce_files` wrote.
    TypeError
        If an argument is of another kind, paths have no order, the prior of a site is no Normal,
        or a selection has to see elements together.

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
    >>> table[["elements", "kept"]].values.tolist()
    [[3, 1]]
    >>> from pyro_bmr import read_masks
    >>> read_masks(folder / "out" / "part-1.masks.safetensors")["w"]
    tensor([False, False,  True])
    """
    import pandas as pd

    shards, folder = _read_paths(paths), _read_folder(out)
    if folder.resolve() in {p for s in shards for p in (s.resolve().parent, s.parent.resolve())}:
        refuse("out", str(folder), "another folder than that of the shards")
    chosen: Any = by_evidence() if select is None else select
    expected = "by_evidence() or top_k(n), which look at each element by itself"
    check_kind("select", chosen, (ByEvidence, TopK), expected)
    check_switch("progress", progress)
    sites = find_sites(shards, _read_names(names))
    log_priors = {site.name: _log_prior(prior, site.name) for site in sites}
    job = Job(shards, sites, log_priors, chosen, folder)
    with progress_bar("elements", progress) as bar:
        task = bar.add_task("reducing", total=job.work, note="")
        rows = job.run(partial(bar.advance, task))
    return pd.DataFrame(rows).set_index("site")[_COLUMNS]


def _read_paths(paths: Any) -> tuple[Path, ...]:
    some = [paths] if isinstance(paths, str | PathLike) else paths
    if isinstance(some, Set | Mapping | bytes) or not isinstance(some, Iterable):
        refuse_kind("paths", paths, "the paths of one file or more, in an order, as in a list")
    shards = tuple(some)
    if not shards:
        refuse("paths", paths, "the paths of one file or more")
    for path in shards:
        check_path(path, "paths")
    shards = tuple(map(Path, shards))
    for shard in shards:
        if shard.is_dir():
            files = "sorted(Path(folder).glob('*.safetensors'))"
            refuse("paths", str(shard), f"files; those in a folder are {files}")
    written = {shard.name for shard in shards} | set(map(masks_name, shards))
    if len(written) < 2 * len(shards):
        names = [str(shard) for shard in shards]
        refuse("paths", names, "files of names that differ but for their endings, and are no masks")
    return shards


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


def _log_prior(prior: Any, name: str) -> float:
    """Compute ln p(0) in nats."""
    what = "prior"
    if not isinstance(prior, Distribution):
        check_function("prior", prior, "a Normal, or a function from the name of a site to one")
        what, prior = f"prior({name!r})", prior(name)
    check_kind(what, prior, Normal, "a Normal, such as Normal(0, 1)")
    if prior.batch_shape.numel() != 1:
        refuse(what, prior, f"one location and one scale for all of {name}")
    loc, scale = prior.loc.double(), prior.scale.double()
    return float(Normal(loc, scale).log_prob(torch.zeros_like(loc)))
