"""MATLAB files as Python's own: structs as dictionaries, cells as arrays of objects, text as str.

An array of structs is a list of dictionaries, down its columns. Versions up to 7 are read by scipy,
version 7.3, which is HDF5, by h5py. Sparse matrices are made dense. The order of a struct's fields
is kept, for SPM stacks them in it.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

_HDF5 = b"\x89HDF\r\n\x1a\n"


class Unordered(dict[str, Any]):
    """A struct of several fields whose file does not tell their order."""


def read_mat(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the variables of a file, by name."""
    from scipy.io import loadmat

    with Path(path).open("rb") as file:
        head = file.read(520)
    if head.startswith((b"MATLAB 7.3", _HDF5)) or head[512:] == _HDF5:
        return _read_hdf5(path)
    try:
        contents = loadmat(path, appendmat=False)
    except Exception as error:
        msg = (
            f"could not read {str(path)!r} as a file of MATLAB ({type(error).__name__}: {error}). "
            "Expected one that MATLAB's save wrote, such as DCM_subject1.mat"
        )
        raise ValueError(msg) from error
    return {name: _convert(value) for name, value in contents.items() if name[:2] != "__"}


def _convert(value: Any) -> Any:
    """Convert what scipy reads."""
    from scipy.sparse import issparse

    if issparse(value):
        return value.toarray()
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.names:
        structs = [
            {name: _convert(one) for name, one in zip(value.dtype.names, record, strict=True)}
            for record in value.reshape(-1, order="F")
        ]
        return structs[0] if len(structs) == 1 else structs
    if value.dtype == object:
        return _cells([_convert(one) for one in value.reshape(-1, order="F")], value.shape)
    if value.dtype.kind in "US":
        return str(value.item()) if value.size == 1 else "" if not value.size else value
    return value


def _cells(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Put values, down the columns, into an array of objects; numpy alone would look into them."""
    cells = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        cells[i] = value
    return cells.reshape(shape, order="F")


def _read_hdf5(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        import h5py
    except ImportError as error:
        msg = (
            f"{str(path)!r} is a MATLAB file of version 7.3, which is read through h5py. Install "
            "it (pip install h5py), or save the file by MATLAB's save(..., '-v7')"
        )
        raise ImportError(msg) from error
    with h5py.File(path, "r") as file:
        return {name: _from_hdf5(file, node) for name, node in file.items() if name[0] != "#"}


def _from_hdf5(file: Any, node: Any) -> Any:
    """Read a group or dataset as MATLAB lays it out: axes run backwards, cells are references."""
    kind = _text(node.attrs.get("MATLAB_class", b""))
    if "MATLAB_sparse" in node.attrs:
        return _sparse(node)
    if not hasattr(node, "dtype"):
        return _struct(file, node)
    if node.attrs.get("MATLAB_empty", 0):
        shape = tuple(int(size) for size in np.asarray(node[()]).reshape(-1))
        empty = {"char": "", "struct": {}, "cell": np.empty(shape, dtype=object)}
        return empty.get(kind, np.zeros(shape))
    values = node[()]
    if node.dtype.kind == "O":
        cells = [_from_hdf5(file, file[reference]) for reference in values.reshape(-1)]
        return _cells(cells, values.shape[::-1])
    if kind == "char":
        rows = ["".join(map(chr, row)) for row in np.atleast_2d(values.T)]
        return rows[0] if len(rows) == 1 else np.array(rows)
    return values.T


def _struct(file: Any, group: Any) -> Any:
    if "MATLAB_fields" in group.attrs:
        names = [_text(b"".join(letters)) for letters in group.attrs["MATLAB_fields"]]
    else:
        names = list(group)
    values = [_from_hdf5(file, group[name]) for name in names]
    ordered = "MATLAB_fields" in group.attrs or len(names) < 2
    kind: Any = dict if ordered else Unordered
    # Of an array of structs each field is references to its values, and not marked as cells.
    many = bool(names) and all(
        group[name].attrs.get("MATLAB_class") is None and getattr(group[name], "dtype", "") == "O"
        for name in names
    )
    if not many:
        return kind(zip(names, values, strict=True))
    records = zip(*(value.reshape(-1, order="F") for value in values), strict=True)
    return [kind(zip(names, record, strict=True)) for record in records]


def _sparse(group: Any) -> np.ndarray:
    """Read columns of rows ``ir`` and numbers ``data``, which begin at ``jc``."""
    from scipy.sparse import csc_array

    starts = np.asarray(group["jc"][()], dtype=np.int64)
    shape = int(group.attrs["MATLAB_sparse"]), len(starts) - 1
    if "ir" not in group:
        return np.zeros(shape)
    data = group["data"][()], np.asarray(group["ir"][()], dtype=np.int64), starts
    return csc_array(data, shape=shape).toarray()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
