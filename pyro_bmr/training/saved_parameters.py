"""Parameters, with what the optimiser knows of them, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_bmr.files.structure import Check, entries, floats, number, refuse, sequence, text
from pyro_bmr.files.supports import check_support, pack_support, unpack_support


def pack_parameter(
    name: str, value: Tensor, mean: Tensor | None, square: Tensor | None, steps: float
) -> dict[str, Any]:
    """Describe a parameter with Adam's running means, if it has been moved."""
    packed: dict[str, Any] = {"name": name, "value": value, "steps": steps}
    if mean is not None and square is not None:
        packed |= {"mean": mean, "square": square}
    known = pyro.get_param_store().get_state()["constraints"]
    if name in known:
        # Asked for only if the parameter comes into being after the first step.
        with suppress(ValueError):
            packed["constraint"] = pack_support(known[name], name)
    return packed


@torch.no_grad()
def unpack_parameters(
    packed: list[Mapping[str, Any]], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Set parameters to the values that were saved, and make those that came into being later.

    They are told by their order, since guides of the same kind have other names in one process.
    Returned are all of them, in this order; what does not fit raises a ValueError.
    """
    own, store = dict(parameters), pyro.get_param_store()
    if len(packed) < len(own):
        there, here = f"{len(packed)} parameters", f"{len(own)}"
        raise _refuse(there, here)
    for one, (name, tensor) in zip(packed, own.items(), strict=False):
        value = one["value"]
        if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            here = f"{name!r} of shape {tuple(tensor.shape)} and {tensor.dtype}"
            there = f"{one['name']!r} of shape {tuple(value.shape)} and {value.dtype}"
            raise _refuse(there, here)
    device = next(iter(own.values())).device
    for one in packed[len(own) :]:
        if "constraint" not in one or one["name"] in own:
            there = f"the parameter {one['name']!r}"
            raise _refuse(there, "none to put it into")
        later = one["value"].to(device).clone().requires_grad_()
        constraint = unpack_support(one["constraint"])
        store.set_state({"params": {one["name"]: later}, "constraints": {one["name"]: constraint}})
        own[one["name"]] = later
    for one, tensor in zip(packed, own.values(), strict=True):
        tensor.data.copy_(one["value"])
    return own


def moments(
    packed: Iterable[Mapping[str, Any]], parameters: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Yield parameters that have been moved, with Adam's means and the number of steps."""
    for one, tensor in zip(packed, parameters.values(), strict=True):
        if "mean" in one:
            mean, square = (one[key].to(tensor.device).clone() for key in ("mean", "square"))
            yield tensor, mean, square, one["steps"]


def _refuse(there: str, here: str) -> ValueError:
    return ValueError(
        f"the checkpoint is of another run: it has {there}, and the program has {here}. Expected "
        "the same model and guide as before; give another path to start anew"
    )


def _check_one(value: Any, where: str) -> None:
    _PARAMETER(value, where)
    for key in ("value", "mean", "square"):
        if key in value and (
            value[key].shape != value["value"].shape or not value[key].isfinite().all()
        ):
            raise refuse(value[key], f"{where}/{key}", "finite numbers of one shape")
    if ("mean" in value) != ("square" in value):
        raise refuse(sorted(value), where, "both means or none")


_PARAMETER = entries(
    {"name": text, "value": floats, "steps": number},
    {"mean": floats, "square": floats, "constraint": check_support},
)
PARAMETERS: Check = sequence(_check_one)
