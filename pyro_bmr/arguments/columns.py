"""Names of the columns of a table, and the axis of a model that runs along them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Names = tuple[str, ...]


def read_columns(values: Iterable[Any]) -> Names:
    """Return the names of the columns of the first table that has names; none otherwise."""
    return next(filter(None, map(_read_names, values)), ())


def find_axis(
    shapes: Mapping[str, Sequence[int]],
    columns: Names,
    plates: Mapping[str, Sequence[str | None]],
) -> tuple[str, int] | None:
    """Find the axis that has an entry for each column; None if there are none, or several.

    ``plates`` has, by name, the plate of each axis: what a plate counts are no columns.
    """
    axes = [(name, i) for name, shape in shapes.items() for i in range(len(shape))]
    found = [(n, i) for n, i in axes if shapes[n][i] == len(columns) and plates[n][i] is None]
    return found[0] if columns and len(found) == 1 else None


def _read_names(value: Any) -> Names:
    if not (hasattr(value, "columns") or hasattr(value, "coords")):
        return ()
    import pandas as pd
    import xarray as xr

    if isinstance(value, pd.DataFrame):
        names = value.columns.tolist()
    elif isinstance(value, xr.DataArray) and value.ndim == 2 and value.dims[1] in value.coords:
        names = value.coords[value.dims[1]].values.tolist()
    else:
        return ()
    return () if all(isinstance(one, int) for one in names) else tuple(map(str, names))
