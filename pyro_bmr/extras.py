"""Packages that only an extra of this one installs."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, package: str, extra: str, use: str) -> Any:
    """Import a module of such a package, or say what it is for and how to install it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        msg = f"{package} not found. Expected it for {use}: pip install 'pyro-bmr[{extra}]'"
        raise ImportError(msg, name=error.name) from error
