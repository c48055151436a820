"""Draws by name, as ArviZ, PyMC, Stan and Pyro hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr


# What ArviZ calls the axes of draws; the last one is that of arviz.extract.
_CHAIN, _DRAW, _SAMPLE = "chain", "draw", "sample"


def read_draws(samples: Mapping[Any, Any]) -> dict[str, Any]:
    """Return arrays by name: of ArviZ's data the posterior group, with chain and draw in front."""
    import xarray as xr

    group = find_group(samples, "posterior")
    if isinstance(samples, xr.Dataset):
        group = samples
    elif isinstance(samples, xr.DataTree) and group is None and samples.data_vars:
        group = samples.to_dataset()
    if group is None:
        held = {str(name): value for name, value in samples.items()}
        if any(isinstance(value, xr.Dataset | xr.DataTree) for value in held.values()):
            msg = f"got draws with the groups {sorted(held)}. Expected a group 'posterior'"
            raise ValueError(msg)
    else:
        held = {str(name): group[name] for name in group.data_vars}
    led = {name: _lead(value) for name, value in held.items()}
    return {name: value for name, value in led.items() if value is not None}


def find_group(samples: Mapping[Any, Any], name: str) -> xr.Dataset | None:
    """Find a group of InferenceData or of a DataTree."""
    import xarray as xr

    if isinstance(samples, xr.Dataset) or name not in samples:
        return None
    group = samples[name]
    if isinstance(group, xr.DataTree):
        return group.to_dataset()
    return group if isinstance(group, xr.Dataset) else None


def _lead(value: Any) -> Any:
    """Bring the axes of draws to the front; None if a named array has none."""
    import xarray as xr

    if not isinstance(value, xr.DataArray):
        return value
    if _SAMPLE in value.dims and _DRAW not in value.dims:
        plain = value.reset_index(_SAMPLE, drop=True) if _SAMPLE in value.indexes else value
        value = plain.drop_vars([_CHAIN, _DRAW], errors="ignore").rename({_SAMPLE: _DRAW})
    if _DRAW not in value.dims:
        return None
    if _CHAIN not in value.dims:
        value = value.drop_vars(_CHAIN, errors="ignore").expand_dims(_CHAIN)
    return value.transpose(_CHAIN, _DRAW, ...)
