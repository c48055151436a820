"""Checkpoints of `prune`: what it needs to go on after any whole round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyro_bmr.files.whole_files import replace_file

_FORMAT = 1


def save_checkpoint(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write what identifies a run and its state, to which torch's random generators are added."""
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    content = {"format": _FORMAT, "run": dict(run), "state": dict(state), "random": generators}
    with replace_file(path) as unfinished:
        torch.save(content, unfinished)


def load_checkpoint(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state of a checkpoint, and set torch's random number generators as they were.

    A file that is not a checkpoint, or is one of another ``run``, raises a ValueError.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        known = content["format"] == _FORMAT
    except Exception as error:
        msg = (
            f"{path} could not be read as a checkpoint ({type(error).__name__}: {error}). Expected "
            "a file that prune(checkpoint=...) wrote; give another path, or remove the file"
        )
        raise ValueError(msg) from error
    if not known:
        msg = (
            f"{path} has the format {content['format']}. Expected {_FORMAT}: resume it with the "
            "version of pyro-bmr that wrote it, or give another path"
        )
        raise ValueError(msg)
    before = content["run"]
    differences = [
        f"{name} was {before.get(name)!r} and is {run.get(name)!r}"
        for name in sorted(before.keys() | run.keys())
        if before.get(name) != run.get(name)
    ]
    if differences:
        msg = (
            f"{path} is of another run: {'; '.join(differences)}. Expected the same model, guide, "
            "data and options as before; give another path to start anew"
        )
        raise ValueError(msg)
    generators = content["random"]
    torch.set_rng_state(generators.pop("cpu"))
    for device, state in generators.items():
        torch.cuda.set_rng_state(state, device)
    return content["state"]
