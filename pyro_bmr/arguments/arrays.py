"""Arrays of other libraries as tensors: numpy, pandas, xarray, and what numpy can read.

Numbers with a fraction take the dtype that they are asked for; whole numbers and truth values keep
theirs, for they may be labels or indices.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.display import a_or_an

if TYPE_CHECKING:
    import pandas as pd

# What torch has no type for, and what holds the same numbers.
_WIDER = {"uint16": "int64", "uint32": "int64", "uint64": "int64", "longdouble": "float64"}
_MOST = 2**63 - 1


def is_array(value: Any) -> bool:
    """Tell whether something is an array, or a table, of another library."""
    if isinstance(value, type | Tensor | np.generic):
        return False
    return hasattr(type(value), "__array__") or hasattr(type(value), "toarray")


def is_number(value: Any) -> bool:
    """Tell whether something is a number that is not of Python's own types."""
    return isinstance(value, Number | np.number) and not isinstance(value, int | float | complex)


def to_number(value: Any) -> Any:
    """Return a number as one of Python's own."""
    return value.item() if isinstance(value, np.generic) else float(value)


def read_rows(value: list[Any]) -> np.ndarray | None:
    """Read a list of numbers, or of such lists of one length; None for any other list."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" and array.size else None


def to_tensor(value: Any, place: str, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return an array or a table as a tensor; ``place`` says which argument it is."""
    array = _read(value, place)
    if array.dtype.kind not in "biufc":
        raise _refuse(value, place, f"of {array.dtype}", "numbers: encode words and dates first")
    if array.dtype.kind == "u" and array.size and array.max() > _MOST:
        raise _refuse(value, place, "of numbers beyond 2**63 - 1", "smaller ones, or floats")
    wanted = np.dtype(_WIDER.get(array.dtype.name, array.dtype)).newbyteorder("=")
    if array.dtype.name.startswith("float") and wanted.itemsize > 8:
        wanted = np.dtype("float64")
    # torch reads neither what may not be written to nor what runs backwards.
    fits = array.dtype == wanted and array.flags.writeable and min(array.strides, default=0) >= 0
    tensor = torch.from_numpy(array if fits else array.astype(wanted, order="C", copy=True))
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def check_tensor(tensor: Tensor, place: str) -> None:
    """Raise a ValueError if a tensor holds no numbers, or not all of them."""
    if tensor.is_meta:
        what, expected = "on the meta device, without numbers", "one with numbers"
    elif tensor.is_quantized:
        what, expected = "of quantized numbers", "floats: pass .dequantize()"
    elif not (tensor.layout is torch.strided or tensor.is_nested):
        what, expected = "that is sparse", "a dense one: pass .to_dense()"
    else:
        return
    raise _refuse(tensor, place, what, expected)


def _read(value: Any, place: str) -> np.ndarray:
    if type(value) is np.ndarray:
        return value
    import pandas as pd
    import xarray as xr

    if isinstance(value, pd.DataFrame):
        return _read_frame(value, place)
    if isinstance(value, pd.Series):
        return _read_frame(value.to_frame(), place)[:, 0]
    if isinstance(value, xr.Dataset):
        raise _refuse(value, place, f"of {list(value)}", "one of its variables, dataset['x']")
    if isinstance(value, np.ma.MaskedArray):
        raise _refuse(value, place, "with a mask", "numbers: fill it, value.filled(...)")
    if not hasattr(value, "__array__"):
        raise _refuse(value, place, "that is sparse", "a dense one: pass .toarray()")
    try:
        return np.asarray(value)
    except Exception as error:
        told = f"that numpy cannot read ({type(error).__name__}: {error})"
        raise _refuse(value, place, told, "an array of numbers") from error


def _read_frame(frame: pd.DataFrame, place: str) -> np.ndarray:
    from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype

    kinds = zip(map(str, frame.columns), frame.dtypes, strict=True)
    others = {name: str(kind) for name, kind in kinds if not is_numeric_dtype(kind)}
    if others:
        told = f"with columns that are no numbers, {others}"
        raise _refuse(frame, place, told, "numbers: pandas.get_dummies encodes words")

    def all_are(kind: Callable[[Any], bool]) -> bool:
        return all(map(kind, frame.dtypes)) and not bool(frame.isna().any(axis=None))

    kind = "bool" if all_are(is_bool_dtype) else "int64" if all_are(is_integer_dtype) else "float64"
    return frame.to_numpy(kind) if kind != "float64" else frame.to_numpy(kind, na_value=np.nan)


def _refuse(value: Any, place: str, what: str, expected: str) -> ValueError:
    import xarray as xr

    shape = getattr(value, "shape", None)
    size = "" if shape is None or isinstance(value, xr.Dataset) else f" of shape {tuple(shape)}"
    return ValueError(f"got {place}, {a_or_an(value)}{size} {what}. Expected {expected}")
