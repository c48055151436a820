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
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_bmr.arguments.checks import check_path
from pyro_bmr.files.whole_files import check_file, replace_file

_KEY = "pyro_bmr.reduce_files"
# A site may be called as no tensor may: "__metadata__".
_SUFFIX = ".mask"


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
    IsADirectoryError
        If it is a folder.
    TypeError
        If it is no path.
    ValueError
        If it is not one that `reduce_files` wrote.

    Examples
    --------
    >>> import tempfile, pyro.distributions as dist
    >>> from pyro_bmr import reduce_files
    >>> folder = Path(tempfile.mkdtemp())
    >>> posterior = {"w.loc": torch.tensor([0.0, 2.0]), "w.scale": torch.tensor([0.1, 0.5])}
    >>> save_file(posterior, folder / "part-1.safetensors")
    >>> table = reduce_files(folder / "part-1.safetensors", folder / "out", prior=dist.Normal(0, 1))
    >>> read_masks(folder / "out" / "part-1.masks.safetensors")
    {'w': tensor([False,  True])}
    """
    check_path(path)
    about = read_about(check_file(Path(path)))
    if about is None:
        msg = f"{path} holds no masks. Expected a file that reduce_files wrote"
        raise ValueError(msg)
    bits = read_bits(Path(path))
    return {
        row["site"]: unpack(bits[row["site"]], row["elements"]).reshape(row["shape"])
        for row in about["rows"]
    }


def write_masks(path: Path, bits: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write bits by site, and what there is to say about them."""
    with replace_file(path) as unfinished:
        tensors = {site + _SUFFIX: packed for site, packed in bits.items()}
        save_file(tensors, unfinished, {_KEY: json.dumps(about)})


def read_bits(path: Path) -> dict[str, Tensor]:
    """Map the bits by site; they are read from the disk as they are looked at."""
    return {key.removesuffix(_SUFFIX): packed for key, packed in load_file(path).items()}


def read_about(path: Path) -> Any:
    """Read what was said about the masks in a file; None if it holds none."""
    try:
        with torch.device("cpu"), safe_open(path, "pt") as file:
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
