"""Mini-batches of a model's arguments, and the scale of the likelihood that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.enumeration import is_enumerated, sample_statements


@dataclass(frozen=True)
class Batches:
    """The arguments of a model, of which some are tensors with a row for each observation.

    With ``batch_size`` None every step takes the arguments as they are, and rows are not counted.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_size: int | None

    @property
    def tensors(self) -> dict[int | str, Tensor]:
        """By position or name, the arguments that are tensors."""
        named = dict(enumerate(self.args)) | dict(self.kwargs)
        return {key: value for key, value in named.items() if isinstance(value, Tensor)}

    @property
    def size(self) -> int:
        """How many rows there are; 1 if they are not counted."""
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
        """Raise a ValueError, or for numpy arrays a TypeError, if the data cannot be trained on."""
        for key, value in (*enumerate(self.args), *self.kwargs.items()):
            if isinstance(value, np.ndarray):
                msg = f"argument {key!r} is a numpy array. Expected a tensor: torch.as_tensor(...)"
                raise TypeError(msg)
        for key, tensor in self.tensors.items():
            _check_numbers(key, tensor)
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


class BatchModel:
    """A model whose likelihood of a batch stands for that of all rows.

    Observed sites, and discrete ones of single rows that are summed out, are scaled by
    rows / batch, except where the model does so (in a sub-sampling plate, or by a scale that
    follows the size of the batch), and except terms that are the same for every batch. The model is
    run on two batches to learn this. One that observes nothing, or has other latent sites with a
    row per observation, raises a ValueError.
    """

    def __init__(self, model: Callable[..., Any], batches: Batches) -> None:
        self.model = model
        self.batches = batches
        self.scaled = self._find_scaled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with a batch in place of the data."""
        if not self.scaled:
            return self.model(*args, **kwargs)
        (key, _), *_ = self.batches.tensors.items()
        rows = len(args[key] if isinstance(key, int) else kwargs[key])
        with _ScaleMessenger(self.scaled, self.batches.size / rows):
            return self.model(*args, **kwargs)

    def _find_scaled(self) -> frozenset[str]:
        size = self.batches.batch_size
        sites = self._sites(size or 1)
        if not any(site["is_observed"] for site in sites.values()):
            msg = (
                f"the model observes nothing: its sites are {sorted(sites)}. Expected an observed "
                "site, pyro.sample(..., obs=y); are the targets among the arguments?"
            )
            raise ValueError(msg)
        if size is None or size == self.batches.size:
            return frozenset()
        others = self._sites(size + 1)
        if others.keys() != sites.keys():
            msg = (
                f"batches of {size} and of {size + 1} rows have other sites: "
                f"{sorted(others.keys() ^ sites.keys())}. Expected the same ones: put rows into a "
                "vectorised plate, or use batch_size=None"
            )
            raise ValueError(msg)
        for name, site in sites.items():
            latent = not (site["is_observed"] or is_enumerated(site))
            if latent and _follows_rows(site, others[name]) and not self._is_subsampled(site):
                msg = (
                    f"the latent site {name!r} has a row for each observation, so a batch would "
                    "have another posterior than the next one. Expected batch_size=None, or a "
                    "sub-sampling plate in the model: pyro.plate(..., size, subsample_size=...)"
                )
                raise ValueError(msg)
        return frozenset(
            name
            for name, site in sites.items()
            if not self._is_subsampled(site)
            and _same_scale(site, others[name])
            and (_depends_on_rows if site["is_observed"] else _follows_rows)(site, others[name])
        )

    def _sites(self, rows: int) -> dict[str, Any]:
        args, kwargs = self.batches.arguments(self.batches.take(slice(rows)))
        with poutine.block(), dry_run(self.model), torch.no_grad():
            torch.manual_seed(0)
            return dict(sample_statements(poutine.trace(self.model).get_trace(*args, **kwargs)))

    def _is_subsampled(self, site: Any) -> bool:
        """Tell whether the model itself says of how many rows the batch is a part."""
        counts = {self.batches.batch_size, self.batches.size}
        return any(
            frame.full_size not in (None, frame.size) and counts & {frame.size, frame.full_size}
            for frame in site["cond_indep_stack"]
        )


class _ScaleMessenger(Messenger):
    def __init__(self, sites: frozenset[str], scale: float) -> None:
        super().__init__()
        self.sites = sites
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            msg["scale"] = msg["scale"] * self.scale


def _same_scale(site: Any, other: Any) -> bool:
    """Tell whether a batch of one row more has the same scale, in the rows that both have."""
    scale, more = (torch.as_tensor(s["scale"]) for s in (site, other))
    if scale.shape != more.shape:
        more = more[tuple(slice(size) for size in scale.shape)]
    return torch.allclose(scale, more)


def _follows_rows(site: Any, other: Any) -> bool:
    return other["fn"].shape() != site["fn"].shape()


def _depends_on_rows(site: Any, other: Any) -> bool:
    """Tell a likelihood from a term that is the same for every batch, such as a penalty."""
    density, more = (s["fn"].log_prob(s["value"]) for s in (site, other))
    return density.shape != more.shape or not torch.equal(density, more)


def _check_numbers(key: int | str, tensor: Tensor) -> None:
    bad = ~tensor.isfinite()
    if bad.any():
        columns = bad.any(0).flatten().nonzero().flatten().tolist() if tensor.dim() > 1 else []
        where = f", in columns {columns[:10]}" if columns else ""
        msg = (
            f"got {int(bad.sum())} NaN or inf in argument {key!r}{where}. Expected numbers: leave "
            "these rows out, or fill them in and tell the model by a mask of its own which they are"
        )
        raise ValueError(msg)
