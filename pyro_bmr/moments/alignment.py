"""Labelled arrays in the order of a posterior: rows, columns and axes by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmr.moments.names import Layout, is_numbered

if TYPE_CHECKING:
    import xarray as xr

Labels = Sequence[Any]


def align_vector(place: str, value: Any, layout: Layout) -> Any:
    """Bring a labelled vector over all elements into their order; leave what has no labels."""
    import pandas as pd
    import xarray as xr

    if isinstance(value, pd.DataFrame) and value.shape[1] == 1:
        value = value.iloc[:, 0]
    if isinstance(value, pd.Series):
        if is_numbered(value.index) and len(value) == layout.size:
            return value.to_numpy()
        return value.to_numpy()[_find(place, value.index, _names(layout))]
    site = _only(layout)
    if site is None and isinstance(value, xr.DataArray) and value.ndim == 1:
        return _reorder(place, value, (layout.elements(),))
    return value if site is None else align_site(place, value, layout, site)


def align_site(place: str, value: Any, layout: Layout, site: str) -> Any:
    """Bring an array of one site into the order of its dimensions and coordinates."""
    import xarray as xr

    dims = layout.dims.get(site, ())
    if not isinstance(value, xr.DataArray) or not dims or value.ndim != len(dims):
        return value
    if set(value.dims) != set(dims):
        msg = f"got {place} with the dimensions {value.dims}. Expected {dims}"
        raise ValueError(msg)
    return _reorder(place, value.transpose(*dims), layout.labels[site])


def align_matrix(place: str, value: Any, layout: Layout) -> Any:
    """Bring the rows and columns of a labelled matrix into the order of the elements."""
    import pandas as pd
    import xarray as xr

    if isinstance(value, pd.DataFrame):
        numbered = is_numbered(value.index) and is_numbered(value.columns)
        if numbered and value.shape == (layout.size, layout.size):
            return value.to_numpy()
        rows, columns = (
            _find(f"{place}, in its {axis},", labels, _names(layout))
            for axis, labels in (("rows", value.index), ("columns", value.columns))
        )
        return value.to_numpy()[np.ix_(rows, columns)]
    if isinstance(value, xr.DataArray):
        site = _only(layout)
        labels: Sequence[Labels] = layout.labels.get(site or "", ())
        if value.ndim == 2 and len(labels) != 1:
            labels = (_names(layout)[0],)
        if value.ndim == 2 * len(labels):
            return _reorder_pairs(place, value, labels).reshape(layout.size, -1)
    return value


def _reorder(place: str, value: xr.DataArray, wanted: Iterable[Labels]) -> np.ndarray:
    array = value.values
    for axis, order in enumerate(_orders(place, value, wanted)):
        array = array if order is None else array.take(order, axis)
    return array


def _reorder_pairs(place: str, value: xr.DataArray, labels: Sequence[Labels]) -> np.ndarray:
    """Reorder axes for rows, then for columns; where one of a pair has no labels, as the other."""
    array, orders = value.values, _orders(place, value, (*labels, *labels))
    for axis, order in enumerate(orders):
        order = orders[axis - len(labels)] if order is None else order
        array = array if order is None else array.take(order, axis)
    return array


def _orders(place: str, value: xr.DataArray, wanted: Iterable[Labels]) -> list[np.ndarray | None]:
    return [
        _find(f"{place}, along {dim!r},", value[dim].values.tolist(), (labels,))
        if dim in value.coords
        else None
        for dim, labels in zip(value.dims, wanted, strict=True)
    ]


def _only(layout: Layout) -> str | None:
    return next(iter(layout.shapes)) if len(layout.shapes) == 1 else None


def _names(layout: Layout) -> tuple[Labels, ...]:
    """List what labels may say: the names of elements, or of one site its coordinates."""
    labels = layout.labels.get(_only(layout) or "", ())
    return (layout.elements(), *labels) if len(labels) == 1 else (layout.elements(),)


def _find(place: str, labels: Iterable[Any], choices: Iterable[Labels]) -> np.ndarray:
    """Find where each name stands among labels."""
    found = list(map(str, labels))
    where = {label: i for i, label in enumerate(found)}
    listed = [list(map(str, names)) for names in choices]
    for names in listed:
        if where.keys() == set(names) and len(found) == len(names):
            return np.array([where[name] for name in names], dtype=np.intp)
    names = listed[0]
    unknown, missing = [n for n in where if n not in names], [n for n in names if n not in where]
    repeated = [name for name, count in Counter(found).items() if count > 1]
    faults = {"unknown": unknown, "missing": missing, "repeated": repeated}
    told = ", ".join(f"{name} {_some(fault)}" for name, fault in faults.items() if fault)
    msg = f"got {place} with labels of which are {told}. Expected those of the mean, in any order"
    raise ValueError(msg)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{names[:5]}{more}"
