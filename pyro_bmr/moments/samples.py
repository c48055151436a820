"""Posterior draws without a Pyro model, as moments of their own coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, read_names, refuse
from pyro_bmr.arguments.patterns import find_names
from pyro_bmr.display import warn
from pyro_bmr.moments.draws import find_group, read_draws
from pyro_bmr.moments.names import Layout, read_numbers
from pyro_bmr.moments.sample_moments import SampleMoments, measure_moments

# Correlations of the prior's draws within so many standard errors of zero are zero.
_ERRORS = 5.0


def read_samples(samples: Any, sites: Any, prior: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a posterior with the moments of draws.

    If no prior is given, it is that of the draws in the group ``prior``, if there is one.
    """
    expected = "InferenceData, a DataTree, a Dataset or a mapping of arrays of draws"
    check_kind("samples", samples, Mapping, expected)
    draws = read_draws(samples)
    group = None if prior else find_group(samples, "prior")
    before = {} if group is None else read_draws(group)
    names = _choose(draws, read_names("sites", sites), [*prior.values(), before])
    moments, arguments = _match({name: draws[name] for name in names})
    _warn("samples", moments, arguments["mean"])
    if group is None:
        return arguments | prior
    missing = sorted(names - before.keys())
    if missing:
        msg = f"got a prior group without {missing}. Expected all of the sites, or sites= to choose"
        raise ValueError(msg)
    drawn, prior_arguments = _match({name: before[name] for name in names})
    _warn("draws of the prior", drawn, arguments["mean"])
    if drawn.correlated and not _independent(drawn):
        spread = {"prior_covariance": prior_arguments["covariance"]}
    else:
        spread = {"prior_scale": drawn.scale}
    return arguments | {"prior_mean": prior_arguments["mean"]} | spread


def _choose(
    draws: Mapping[str, Any], sites: tuple[str, ...] | None, hints: Iterable[Any]
) -> dict[str, None]:
    """Choose variables: those that are asked for, or of which there is a prior, or all."""
    if sites is not None:
        found = {name: find_names(name, draws) for name in sites}
        unknown = [name for name, meant in found.items() if not meant]
        if unknown or not sites:
            refuse("sites", unknown or list(sites), f"some of {sorted(draws)}")
        return dict.fromkeys(itertools.chain(*found.values()))
    for hint in hints:
        if isinstance(hint, Mapping) and (held := [name for name in draws if name in hint]):
            return dict.fromkeys(held)
    if not draws:
        msg = "got no draws. Expected arrays of draws by name, with the axes chain and draw"
        raise ValueError(msg)
    return dict.fromkeys(draws)


def _match(draws: Mapping[str, Any]) -> tuple[SampleMoments, dict[str, Any]]:
    numbers = {name: _read(name, value) for name, value in draws.items()}
    counts = {name: tuple(values.shape[:2]) for name, values in numbers.items()}
    if len(set(counts.values())) > 1:
        msg = f"got other numbers of chains and draws, {counts}. Expected as many of each variable"
        raise ValueError(msg)
    flat = [values.reshape(*values.shape[:2], -1) for values in numbers.values()]
    moments = measure_moments(torch.cat(flat, -1))
    layout = Layout({name: values.shape[2:] for name, values in numbers.items()}, {})
    means = layout.split(moments.mean)
    mean = {name: _label(means[name], draws[name]) for name in draws}
    spread = {"covariance": moments.root.mT @ moments.root} if moments.correlated else {}
    return moments, {"mean": mean, **(spread or {"scale": moments.scale})}


def _read(name: str, value: Any) -> Tensor:
    """Read draws in the shape ``(chains, draws, ...)``; axes without names begin with the draws."""
    import xarray as xr

    numbers = read_numbers(f"the draws of {name!r}", value)
    if isinstance(value, xr.DataArray):
        return numbers
    if not numbers.dim():
        refuse(f"the draws of {name!r}", value, "an array of shape (draws, ...)")
    return numbers[None]


def _label(mean: Tensor, draws: Any) -> Any:
    """Give a mean the dimensions and coordinates of its draws."""
    import xarray as xr

    if not isinstance(draws, xr.DataArray):
        return mean
    return draws.isel(chain=0, draw=0, drop=True).copy(data=mean.cpu().numpy())


def _independent(moments: SampleMoments) -> bool:
    """Tell whether all correlations of draws are within chance of zero."""
    scale = moments.scale
    root = torch.where(scale > 0, moments.root / scale, 0.0)
    correlation = root.mT @ root
    correlation = correlation - correlation.diagonal().diag()
    return float(correlation.abs().max()) < _ERRORS / moments.total**0.5


def _warn(what: str, moments: SampleMoments, mean: Mapping[str, Any]) -> None:
    """Warn of what a Gaussian does not hold: few draws, or another shape."""
    import xarray as xr

    if moments.correlated and not moments.odd:
        return

    def names() -> tuple[str, ...]:
        labels = {
            name: tuple(tuple(one[dim].values.tolist()) for dim in one.dims)
            for name, one in mean.items()
            if isinstance(one, xr.DataArray)
        }
        shapes = {name: torch.Size(one.shape) for name, one in mean.items()}
        return Layout(shapes, labels).elements()

    warn(f"the {what} are replaced by the Gaussian that has their {moments.describe(names)}")
