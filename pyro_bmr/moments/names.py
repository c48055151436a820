"""Named vectors: arrays by site, flattened one after the other, and what each element is called."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bmr.arguments.arrays import check_tensor, is_array, is_number, read_rows, to_tensor
from pyro_bmr.arguments.checks import check_kind, read_names, refuse, refuse_kind

if TYPE_CHECKING:
    import pandas as pd

# What a vector without names is called.
ALONE = "theta"


@dataclass(frozen=True)
class Layout:
    """Sites in the order of a vector: their shapes, and where they have them, their dimensions.

    ``labels``, by site, are the coordinates along each axis, ``dims`` what the axes are called.
    """

    shapes: Mapping[str, torch.Size]
    labels: Mapping[str, tuple[tuple[Any, ...], ...]]
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return sum(shape.numel() for shape in self.shapes.values())

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Bring a vector into the shapes of the sites."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def elements(self) -> tuple[str, ...]:
        """Name each element: ``w`` of a scalar, ``w[3,1]`` or ``w[V1,left]`` of an array."""
        return tuple(itertools.chain.from_iterable(map(self._elements, self.shapes)))

    def _elements(self, name: str) -> Iterator[str]:
        axes = self.labels.get(name) or [range(size) for size in self.shapes[name]]
        for index in itertools.product(*axes):
            yield f"{name}[{','.join(map(str, index))}]" if index else name


def read_vector(value: Any, names: Sequence[str] | None) -> tuple[Tensor, Layout]:
    """Read a mean: a mapping or a Dataset by site, a named array, or a vector with names."""
    import pandas as pd
    import xarray as xr

    if isinstance(value, xr.Dataset):
        value = {str(name): value[name] for name in value}
    if isinstance(value, Mapping):
        return _read_mapping(value, names)
    if isinstance(value, pd.DataFrame):
        refuse("mean", value, "one column of it, such as frame['mean']")
    given = read_names("names", names, "names of elements")
    if isinstance(value, pd.Series):
        value, given = _read_series(value, given)
    if given is None:
        name = str(getattr(value, "name", None) or ALONE)
        return _read_mapping({name: value}, None)
    vector = read_numbers("mean", value)
    if vector.shape != (len(given),):
        refuse("mean", value, f"a vector with an element for each of the {len(given)} names")
    repeated = [name for name, count in Counter(given).items() if count > 1]
    if repeated:
        refuse("names", repeated[:5], "names that differ from each other")
    return vector, Layout(dict.fromkeys(given, torch.Size([])), {})


def is_numbered(index: pd.Index) -> bool:
    """Tell whether an index is the one that pandas makes where no labels are given."""
    import pandas as pd

    return isinstance(index, pd.RangeIndex) and index.equals(pd.RangeIndex(len(index)))


def read_numbers(place: str, value: Any) -> Tensor:
    """Read an array of finite numbers in float64, whatever library it is of."""
    if isinstance(value, Tensor):
        tensor = value.detach().to_dense()
        check_tensor(tensor, place)
    elif isinstance(value, list | tuple) and (rows := read_rows(list(value))) is not None:
        tensor = torch.from_numpy(rows)
    elif is_array(value):
        dense = value.toarray() if hasattr(type(value), "toarray") else value
        tensor = to_tensor(dense, place, torch.float64, None)
    elif isinstance(value, int | float) or is_number(value):
        tensor = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    else:
        refuse_kind(place, value, "an array of numbers")
    if tensor.is_complex():
        refuse(place, value, "real numbers")
    tensor = tensor.double()
    if not tensor.isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        msg = (
            f"got {place} with {bad} of {tensor.numel()} elements NaN or infinite. Expected finite "
            "numbers"
        )
        raise ValueError(msg)
    return tensor


def _read_series(
    series: pd.Series, names: tuple[str, ...] | None
) -> tuple[pd.Series, tuple[str, ...]]:
    """Read what the elements are called; names beside an index say the order."""
    labels = tuple(map(str, series.index))
    if names is None or is_numbered(series.index):
        return series, labels if names is None else names
    if sorted(labels) != sorted(names):
        refuse("names", list(names)[:5], f"the labels of the Series, {list(labels)[:5]}, or none")
    return series.set_axis(list(labels)).reindex(list(names)), names


def _read_mapping(value: Mapping[Any, Any], names: Any) -> tuple[Tensor, Layout]:
    import xarray as xr

    if names is not None:
        refuse("names", names, "none beside a mapping, whose keys are the names")
    if not value:
        refuse("mean", value, "arrays by name, of at least one element")
    shapes, labels, dims, parts = {}, {}, {}, []
    for name, one in value.items():
        check_kind("mean", name, str, "names that are words")
        part = read_numbers(f"the mean of {name!r}", one)
        shapes[name] = part.shape
        if isinstance(one, xr.DataArray):
            labels[name] = tuple(tuple(one[dim].values.tolist()) for dim in one.dims)
            dims[name] = tuple(map(str, one.dims))
        parts.append(part.reshape(-1))
    vector = torch.cat(parts)
    if not len(vector):
        refuse("mean", value, "at least one element")
    return vector, Layout(shapes, labels, dims)
