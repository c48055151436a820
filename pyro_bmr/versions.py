"""The version of this package, and those of what it works with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.table import Table

# Stated here alone; the build reads it.
__version__ = "0.2.0.dev0"

_PACKAGES = (
    "torch",
    "pyro-ppl",
    "arviz",
    "numpy",
    "pandas",
    "scipy",
    "xarray",
    "rich",
    "safetensors",
    "matplotlib",
    "scikit-learn",
    "onnx",
)


def draw_versions() -> Table:
    """Draw the table of versions that a report of an error needs."""
    table = Table("what", "version")
    for what, found in list_versions().items():
        table.add_row(what, found)
    return table


def list_versions() -> dict[str, str]:
    """List versions by what they are of; a package that is missing is said to be."""
    return {
        "pyro-bmr": __version__,
        **{package: _version(package) for package in _PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "CUDA": _cuda(),
    }


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
