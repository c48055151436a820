"""Nested data with tensors as one file: safetensors, with the rest as JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr.display import a_or_an
from pyro_bmr.files.whole_files import check_file, replace_file
from pyro_bmr.versions import __version__

# In the first, the sum was over the plan alone.
_FORMAT = 2
_KEY, _SUM, _TENSOR = "pyro_bmr", "sha256", "$tensor"


def write_plan(path: str | Path, plan: Mapping[str, Any]) -> None:
    """Write nested data to a file that is whole at every moment.

    Mappings with strings as keys, lists, tensors, strings, numbers, booleans and None; anything
    else raises a TypeError.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(plan, "", tensors)
    content = {"format": _FORMAT, "version": __version__, "plan": packed}
    text = json.dumps({**content, _SUM: _digest(content, tensors)})
    with replace_file(path) as unfinished:
        save_file(tensors, unfinished, {_KEY: text})


def read_plan(path: str | Path, check: Callable[[Any], None] | None = None) -> Any:
    """Read what `write_plan` wrote, with tensors on the CPU. Nothing in the file is run.

    A file that is cut off, damaged or of another kind raises an `UnreadableError`, and so does one
    whose plan ``check`` refuses with a `StructureError`; one of a newer format, a ValueError.
    """
    path = check_file(path)
    path.open("rb").close()  # says what is wrong with a path, which safe_open does not
    try:
        with torch.device("cpu"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content = json.loads(metadata[_KEY])
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        saved_format, saved_version = int(content["format"]), content["version"]
        newer = saved_format > _FORMAT
        intact = newer or _is_intact(metadata, content, tensors)
        plan = None if newer else _unpack(content["plan"], tensors)
        if intact and not newer and check is not None:
            check(plan)
    except OSError:
        raise
    except Exception as error:
        # Whatever goes wrong with what is in a file is a fault of the file.
        raise UnreadableError(path, f"{type(error).__name__}: {error}") from error
    if newer:
        msg = (
            f"{path} has the format {saved_format} and was saved by pyro-bmr {saved_version}. "
            f"Expected a format up to {_FORMAT}, which this version, {__version__}, knows: "
            "pip install --upgrade pyro-bmr"
        )
        raise ValueError(msg)
    if not intact:
        raise UnreadableError(path, "its content is not what was saved")
    return plan


class UnreadableError(ValueError):
    """A file that is damaged or of another kind; ``why`` it is thought to be."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(
            f"{path} could not be read ({why}). Expected a file that pyro_bmr saved, and all of "
            "it: it may be cut off, damaged or of another kind; copy it again, or save the result "
            "again"
        )
        self.why = why


def _is_intact(
    metadata: Mapping[str, str], content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> bool:
    summed = {key: value for key, value in content.items() if key != _SUM}
    if content["format"] == 1:
        summed = content["plan"]
    return metadata.keys() == {_KEY} and content[_SUM] == _digest(summed, tensors)


def _digest(packed: Any, tensors: Mapping[str, Tensor]) -> str:
    """Sum up what is in a file, to notice damage: bits that changed would be other numbers."""
    digest = hashlib.sha256(json.dumps(packed).encode(), usedforsecurity=False)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: path}
    if isinstance(value, Mapping) and _TENSOR not in value:
        keys = {key: str(key).replace("~", "~0").replace("/", "~1") for key in value}
        return {k: _pack(v, f"{path}/{keys[k]}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    msg = (
        f"cannot save {a_or_an(value)} at {path}. Expected tensors, numbers, strings, "
        "None, and lists and mappings of these"
    )
    raise TypeError(msg)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unpack(v, tensors) for key, v in value.items()}
    return [_unpack(v, tensors) for v in value] if isinstance(value, list) else value
