"""Mini-batches of a model's arguments, and the scale of the likelihood that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.programs.enumeration import is_enumerated
from pyro_bmr.programs.failures import running
from pyro_bmr.programs.trial_runs import (
    Sites,
    constant_scale,
    depends_on_rows,
    fits,
    follows_rows,
    has_other_prior,
    run_trial,
    same_scale,
    shapes,
    stands_for,
)

# Relatively, how near a scale is that is meant to be the same.
_ABOUT = 0.02


@dataclass(frozen=True)
class Batches:
    """The arguments of a model, of which some are tensors with a row for each observation.

    With ``batch_size`` None every step takes the arguments as they are, and rows are not counted.
    Where they are an example of more rows, ``num_rows`` is how many there are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_size: int | None
    num_rows: int | None = None

    @property
    def tensors(self) -> dict[int | str, Tensor]:
        """By position or name, the arguments that are tensors."""
        named = dict(enumerate(self.args)) | dict(self.kwargs)
        return {key: value for key, value in named.items() if isinstance(value, Tensor)}

    @property
    def size(self) -> int:
        """How many rows there are; 1 if they are not counted."""
        return self._length if self.num_rows is None else self.num_rows

    @property
    def _length(self) -> int:
        """How many rows the tensors have."""
        return 1 if self.batch_size is None else len(next(iter(self.tensors.values())))

    def take(self, rows: Tensor | slice) -> tuple[Tensor, ...]:
        """Return a batch, in the order of ``tensors``; all rows if they are not counted."""
        return self.pick(self.tensors.values(), rows)

    def pick(self, tensors: Iterable[Tensor], rows: Tensor | slice) -> tuple[Tensor, ...]:
        """Return a batch of given tensors, which are in the order of ``tensors``."""
        return tuple(tensors) if self.batch_size is None else tuple(t[rows] for t in tensors)

    def arguments(self, batch: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the tensors of a batch in their places."""
        parts = dict(zip(self.tensors, batch, strict=True))
        args = tuple(parts.get(i, value) for i, value in enumerate(self.args))
        return args, {name: parts.get(name, value) for name, value in self.kwargs.items()}

    def check(self) -> None:
        """Raise a ValueError if batches cannot be taken."""
        if self.batch_size is None:
            return
        lengths = {key: len(t) if t.dim() else None for key, t in self.tensors.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            shapes = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
            msg = (
                f"got tensors of shapes {shapes}, by position or name of the argument. Expected "
                "one row per observation in each, the same number in all; give the model what is "
                "not data beforehand, by functools.partial(model, ...)"
            )
            raise ValueError(msg)
        if not 0 < self.batch_size <= self.size:
            msg = (
                f"got batch_size={self.batch_size} for {self.size} rows. Expected 1 to "
                f"{self.size}, or None for all rows at every step"
            )
            raise ValueError(msg)

    def take_first(self) -> tuple[Tensor, ...]:
        """Return a first batch; one of its rows has NaN or inf, if any has."""
        if self.batch_size is None:
            return self.take(slice(None))
        finite = [t.isfinite().unsqueeze(-1).flatten(1).all(1).cpu() for t in self.tensors.values()]
        whole = torch.stack(finite).all(0)
        rows = torch.arange(self._length, device="cpu")
        order = torch.cat([rows[~whole][:1], rows[whole], rows[~whole][1:]])
        return self.take(order[: self.batch_size])

    def describe_missing(self) -> str:
        """Say how many NaN or inf which arguments hold; nothing if none does."""
        return " and ".join(
            _describe_missing(key, tensor)
            for key, tensor in self.tensors.items()
            if not tensor.isfinite().all()
        )


class BatchModel:
    """A model whose likelihood of a batch stands for that of all rows.

    Observed sites, and discrete ones of single rows that are summed out, are scaled by
    rows / batch, except where the model does so (in a sub-sampling plate, or by a scale that
    follows the size of the batch), and except terms that are the same for every batch. The model is
    run on a few batches to learn this. One that observes nothing, has other latent sites with a row
    per observation, a prior that follows the data, or data that no batch cuts, raises a ValueError.

    ``doubled`` are those of the ``scaled`` sites that the model scales by about as much itself, by
    a constant. The rows may be those of one of many shards, over which losses are averaged;
    ``shards`` are the numbers of rows in each, and ``own`` the sites that the model scales then.
    ``takes_any`` is False for a model that takes batches of this size alone.
    """

    def __init__(
        self, model: Callable[..., Any], batches: Batches, shards: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.batches = batches
        self.shards = shards or (batches.size,)
        self.scaled, self.own = frozenset[str](), frozenset[str]()
        self.doubled = dict[str, float]()
        self.takes_any = True
        size = batches.batch_size or 1
        sites = self._sites(size, batches.size)
        observed = {name: site for name, site in sites.items() if site["is_observed"]}
        _check_observed(observed, sites)
        if batches.batch_size in {None, batches.size} and len(self.shards) == 1:
            return
        more = size + 1 if size < batches.size else size - 1
        if all(map(self._is_subsampled, observed.values())) and not self._runs(more):
            self.takes_any, others = False, sites
        else:
            others = self._others(sites, more)
            # What a single row adds may be nothing, if it has no data.
            last = self._sites(-min(size, max(2, batches.size // 2)), size)
            _check_plates(sites, others)
            self.scaled = self._find_scaled(sites, others, last)
            self.doubled = self._find_doubled(sites)
        if len(self.shards) > 1:
            self.own = self._find_own(sites, others)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with a batch in place of the data."""
        if not self.scaled | self.own:
            return self.model(*args, **kwargs)
        (key, _), *_ = self.batches.tensors.items()
        rows = len(args[key] if isinstance(key, int) else kwargs[key])
        scales = dict.fromkeys(self.own, self._share)
        scales |= dict.fromkeys(self.scaled, len(self.shards) * self.batches.size / rows)
        with _ScaleMessenger(scales):
            return self.model(*args, **kwargs)

    def of(self, model: Callable[..., Any]) -> BatchModel:
        """Return the same of a model with the same statements, without learning it again."""
        other = copy(self)
        other.model = model
        return other

    def run(self, batch: tuple[Tensor, ...], seed: int = 0) -> Sites:
        """Return the sites of a trial run on a batch, not scaled."""
        return run_trial(self.model, *self.batches.arguments(batch), seed)

    @property
    def _share(self) -> float:
        """The rows of this shard, of as many as one has in the mean."""
        return self.batches.size * len(self.shards) / sum(self.shards)

    @property
    def _instead(self) -> str:
        return "batch_size=None" if len(self.shards) == 1 else "all rows in one process"

    def _others(self, sites: Mapping[str, Any], more: int) -> Sites:
        """Run the model on another number of rows."""
        size = self.batches.batch_size or 1
        others = self._sites(more, size)
        if others.keys() != sites.keys():
            msg = (
                f"batches of {size} and of {more} rows have other sites: "
                f"{sorted(others.keys() ^ sites.keys())}. Expected the same ones: put rows into a "
                f"vectorised plate, or use {self._instead}"
            )
            raise ValueError(msg)
        return others

    def _find_scaled(
        self, sites: Mapping[str, Any], others: Mapping[str, Any], last: Mapping[str, Any]
    ) -> frozenset[str]:
        left = {name: site for name, site in sites.items() if not self._is_subsampled(site)}
        for name, site in sites.items():
            if site["is_observed"]:
                _check_data(name, site, others[name], self.batches, self._instead)
            elif name in left and not is_enumerated(site):
                self._check_latent(name, site, others[name])
                self._check_prior(name, site, [others[name], last.get(name, site)])
        return frozenset(
            name
            for name, site in left.items()
            if same_scale(site, others[name])
            and (
                depends_on_rows(site, others[name]) or depends_on_rows(site, last.get(name, site))
                if site["is_observed"]
                else follows_rows(site, others[name])
            )
        )

    def _check_latent(self, name: str, site: Any, other: Any) -> None:
        if follows_rows(site, other):
            msg = (
                f"the latent site {name!r} has a row for each observation, so a batch would "
                f"have another posterior than the next one. Expected {self._instead}, or a "
                "sub-sampling plate in the model: pyro.plate(..., size, subsample_size=...)"
            )
            raise ValueError(msg)

    def _check_prior(self, name: str, site: Any, others: Sequence[Any]) -> None:
        """Raise a ValueError if a prior is not that of all rows, and no other one in each run."""
        if not any(has_other_prior(site, other) for other in others):
            return
        if has_other_prior(site, self._run(self.batches.batch_size or 1).get(name, site)):
            return
        msg = (
            f"the prior of the latent site {name!r} depends on the rows that the model is given, "
            "so that of a batch is another than the next one's. Expected what is computed from "
            "data, such as a mean, from all rows beforehand, by functools.partial(model, ...); or "
            f"{self._instead}"
        )
        raise ValueError(msg)

    def _find_own(self, sites: Mapping[str, Any], others: Mapping[str, Any]) -> frozenset[str]:
        """Find what the model scales to all rows of all shards; a ValueError if to those of one."""
        own = {
            name: site
            for name, site in sites.items()
            if self._is_subsampled(site) or not same_scale(site, others[name])
        }
        for name, site in own.items():
            if stands_for(site, self.batches.batch_size or 1) == self.batches.size:
                msg = (
                    f"at {name!r} the model scales a batch to {self.batches.size} rows, those of "
                    f"this process alone. Expected the {sum(self.shards)} rows of all processes, "
                    "in a sub-sampling plate or a scale, or a plate as long as the batch, "
                    "pyro.plate('data', len(x)), without a scale"
                )
                raise ValueError(msg)
            if not site["is_observed"] and self._share != 1:
                msg = (
                    f"got {list(self.shards)} rows in the processes, and the latent site {name!r} "
                    "in a sub-sampling plate, whose posterior would count unequally. Expected as "
                    "many rows in each process"
                )
                raise ValueError(msg)
        return frozenset(name for name, site in own.items() if site["is_observed"])

    def _find_doubled(self, sites: Mapping[str, Any]) -> dict[str, float]:
        constants = {name: constant_scale(site) for name, site in sites.items()}
        # A scale that priors have as well is one of the whole model.
        others = {constants[name] for name, site in sites.items() if not site["is_observed"]}
        found = {name: constants[name] for name in sorted(self.scaled)}
        return {
            name: scale
            for name, scale in found.items()
            if scale is not None and scale not in {1.0, *others} and self._is_about_whole(scale)
        }

    def _is_about_whole(self, scale: float) -> bool:
        """Tell whether a scale is rows / batch, or that as a whole number of batches."""
        size, rows = self.batches.batch_size or 1, self.batches.size
        factors = rows / size, rows // size, math.ceil(rows / size)
        return any(
            math.isclose(scale, many * factor, rel_tol=_ABOUT)
            for factor in factors
            for many in (1, len(self.shards))
        )

    def _sites(self, rows: int, others: int) -> Sites:
        """Run the model on so many rows; a ValueError if it runs on another number of them only."""
        try:
            return self._run(rows)
        except Exception as error:
            if not self._runs(others):
                with running("the model", *self.batches.arguments(self._take(rows))):
                    raise
            msg = (
                f"the model runs on {others} rows, but not on {abs(rows)} of them "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Expected it to run "
                "on any number: all that has a row for each observation comes as an argument, of "
                "which a batch takes rows, and plates are as long as it, pyro.plate('data', "
                f"len(x)); or use {self._instead}"
            )
            raise ValueError(msg) from error

    def _runs(self, rows: int) -> bool:
        try:
            self._run(rows)
        except Exception:
            return False
        return True

    def _run(self, rows: int) -> Sites:
        return self.run(self._take(rows))

    def _take(self, rows: int) -> tuple[Tensor, ...]:
        """Return so many first rows; last ones, if it is negative."""
        return self.batches.take(slice(rows) if rows >= 0 else slice(rows, None))

    def _is_subsampled(self, site: Any) -> bool:
        """Tell whether the model itself says of how many rows the batch is a part."""
        counts = {self.batches.batch_size, self.batches.size}
        return any(
            frame.full_size not in (None, frame.size) and counts & {frame.size, frame.full_size}
            for frame in site["cond_indep_stack"]
        )


class _ScaleMessenger(Messenger):
    def __init__(self, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.scales = scales

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.scales:
            msg["scale"] = msg["scale"] * self.scales[msg["name"]]


def _check_observed(observed: Mapping[str, Any], sites: Mapping[str, Any]) -> None:
    if not observed:
        msg = (
            f"the model observes nothing: its sites are {sorted(sites)}. Expected an observed "
            "site, pyro.sample(..., obs=y); are the targets among the arguments?"
        )
        raise ValueError(msg)


def _check_plates(sites: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise a ValueError if the model sub-samples the batch, which is not all rows."""
    for name, site in sites.items():
        full = {frame.name: frame.full_size for frame in others[name]["cond_indep_stack"]}
        for frame in site["cond_indep_stack"]:
            if frame.full_size not in {None, frame.size, full.get(frame.name)}:
                msg = (
                    f"at {name!r} the model has a sub-sampling plate {frame.name!r} of "
                    f"{frame.full_size} rows, those of the batch, and draws {frame.size} of them. "
                    "Expected one of all rows, or a plate as long as the batch, "
                    "pyro.plate('data', len(x)), of which fit takes batches"
                )
                raise ValueError(msg)


def _check_data(name: str, site: Any, other: Any, batches: Batches, instead: str) -> None:
    """Raise a ValueError if data and distribution differ in length because only one is cut."""
    if fits(site) and fits(other):
        return
    (shape, data), (_, more) = shapes(site), shapes(other)
    what = "data do" if data == more else "distribution does"
    msg = (
        f"at the observed site {name!r}, a batch of {batches.batch_size} of {batches.size} rows "
        f"has data of shape {tuple(data)} and a distribution of shape {tuple(shape)}: its {what} "
        "not come as an argument, of which a batch takes rows, but by pyro.condition, from a "
        "closure or a module. Expected all that has a row for each observation among the "
        f"arguments, fit(model, guide, x, y, ...) of a model(x, y) with pyro.sample({name!r}, ..., "
        f"obs=y); or {instead}"
    )
    raise ValueError(msg)


def _describe_missing(key: int | str, tensor: Tensor) -> str:
    bad = ~tensor.isfinite()
    columns = bad.any(0).flatten().nonzero().flatten().tolist() if tensor.dim() > 1 else []
    where = f", in columns {columns[:10]}" if columns else ""
    return f"{int(bad.sum())} NaN or inf in argument {key!r}{where}"
