"""Masks in files: a bit for each element."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_bmr.arguments.checks import check_path
from pyro_bmr.files.whole_files import check_file, replace_file

_KEY = "pyro_bmr.reduce_files"


def read_masks(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Read the masks that `reduce_files` wrote beside a shard.

    Parameters
    ----------
    path : str or path
        A file that ends in ``.masks.safetensors``.

    Returns
    -------
    dict of Tensor
        By site, boolean, True where an element was kept.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not one that `reduce_files` wrote.
    """
    check_path(path)
    about = read_about(check_file(Path(path)))
    if about is None:
        msg = f"{path} holds no masks. Expected a file that reduce_files wrote"
        raise ValueError(msg)
    with safe_open(path, "pt") as file:
        return {
            row["site"]: unpack(file.get_tensor(row["site"]), row["elements"]).reshape(row["shape"])
            for row in about["rows"]
        }


def write_masks(path: Path, packed: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write bits by site, and what there is to say about them."""
    with replace_file(path) as unfinished:
        save_file(dict(packed), unfinished, {_KEY: json.dumps(about)})


def read_about(path: Path) -> Any:
    """Read what was said about the masks in a file; None if it holds none."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except SafetensorError:
        return None
    return None if text is None else json.loads(text)


def pack(mask: Tensor) -> Tensor:
    """Put eight elements into a byte, the first into its lowest bit."""
    return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))


def unpack(packed: Tensor, count: int) -> Tensor:
    """Take so many elements out of bytes."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little")).bool()
