"""The states of random number generators as plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state

from pyro_bmr.files.structure import Check, count, entries, number, optional, sequence, tensor, text


def pack_generators(
    devices: Collection[torch.device], own: Sequence[torch.Generator] = ()
) -> dict[str, Any]:
    """Read the generators of torch, on the CPU and on these devices, of Python, NumPy, a loader."""
    state = get_rng_state()
    version, words, gauss = state["random"]
    kind, keys, *rest = state["numpy"]
    return {
        "torch": state["torch"],
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"kind": kind, "words": keys.tolist(), "rest": list(rest)},
        # In their order, since devices have other numbers where fewer are visible.
        "devices": [torch.cuda.get_rng_state(device) for device in _order(devices)],
        "own": [generator.get_state() for generator in own],
    }


def set_generators(
    packed: Mapping[str, Any],
    devices: Collection[torch.device],
    own: Sequence[torch.Generator] = (),
) -> None:
    """Set the generators that `pack_generators` read; a ValueError says if they are no states."""
    python, numpy = packed["python"], packed["numpy"]
    try:
        words = np.array(numpy["words"], np.uint32)
        state = {
            "torch": packed["torch"],
            "random": (python["version"], tuple(python["words"]), python["gauss"]),
            "numpy": (numpy["kind"], words, *numpy["rest"]),
        }
        set_rng_state(state)
        for device, saved in zip(_order(devices), packed["devices"], strict=False):
            torch.cuda.set_rng_state(saved, device)
        for generator, saved in zip(own, packed["own"], strict=True):
            generator.set_state(saved)
    except Exception as error:
        msg = (
            f"the checkpoint has states of random number generators that cannot be set ({error}). "
            "Expected those of the same versions of Python, NumPy and torch; give another path to "
            "start anew"
        )
        raise ValueError(msg) from error


def _order(devices: Collection[torch.device]) -> list[torch.device]:
    return sorted((one for one in devices if one.type == "cuda"), key=str)


GENERATORS: Check = entries(
    {
        "torch": tensor,
        "python": entries({"version": count, "words": sequence(count), "gauss": optional(number)}),
        "numpy": entries({"kind": text, "words": sequence(count), "rest": sequence(number)}),
        "devices": sequence(tensor),
        "own": sequence(tensor),
    }
)
