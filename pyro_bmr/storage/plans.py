"""Nested data with tensors as one file: safetensors, with the rest as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr.storage.whole_files import replace_file

FORMAT = 1
_KEY, _TENSOR = "pyro_bmr", "$tensor"


def write_plan(path: str | Path, plan: Mapping[str, Any]) -> None:
    """Write nested data to a file that is whole at every moment.

    Parameters
    ----------
    path : str or Path
        The file, which is replaced.
    plan : mapping
        Mappings with strings as keys, lists, tensors, strings, numbers, booleans and None.

    Raises
    ------
    TypeError
        If it holds anything else.

    Examples
    --------
    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "plan.bmr"
    >>> write_plan(path, {"kind": "example", "values": [torch.ones(2), None]})
    >>> read_plan(path)
    {'kind': 'example', 'values': [tensor([1., 1.]), None]}
    """
    tensors: dict[str, Tensor] = {}
    content = {"format": FORMAT, "version": _version(), "plan": _pack(plan, "", tensors)}
    with replace_file(path) as unfinished:
        save_file(tensors, unfinished, {_KEY: json.dumps(content)})


def read_plan(path: str | Path) -> Any:
    """Read what `write_plan` wrote. Nothing in the file is run.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    dict
        With tensors on the CPU.

    Raises
    ------
    ValueError
        If the file is cut off, is of another kind, or of a newer format.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "plan.bmr"
    >>> _ = path.write_bytes(b"something else")
    >>> read_plan(path)
    Traceback (most recent call last):
    ValueError: ... could not be read (...). Expected a file that pyro_bmr saved, and all of it...
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            _check_format(path, content)
            return _unpack(content["plan"], file)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        msg = (
            f"{path} could not be read ({type(error).__name__}: {error}). Expected a file that "
            "pyro_bmr saved, and all of it: it may be cut off or of another kind; copy it again, "
            "or save the result again"
        )
        raise ValueError(msg) from error


def _check_format(path: Path, content: Mapping[str, Any]) -> None:
    if content["format"] > FORMAT:
        msg = (
            f"{path} has the format {content['format']} and was saved by pyro-bmr "
            f"{content['version']}. Expected a format up to {FORMAT}, which this version, "
            f"{_version()}, knows: pip install --upgrade pyro-bmr"
        )
        raise ValueError(msg)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping) and _TENSOR not in value:
        keys = {key: str(key).replace("~", "~0").replace("/", "~1") for key in value}
        return {k: _pack(v, f"{path}/{keys[k]}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    msg = (
        f"cannot save a {type(value).__name__} at {path}. Expected tensors, numbers, strings, "
        "None, and lists and mappings of these"
    )
    raise TypeError(msg)


def _unpack(value: Any, file: Any) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return file.get_tensor(value[_TENSOR])
        return {key: _unpack(v, file) for key, v in value.items()}
    return [_unpack(v, file) for v in value] if isinstance(value, list) else value


def _version() -> str:
    try:
        return version("pyro-bmr")
    except PackageNotFoundError:
        return "unknown"
