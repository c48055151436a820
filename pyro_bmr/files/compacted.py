"""A compacted model as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.overrides import get_overridable_functions

from pyro_bmr.cutting.changes import Change
from pyro_bmr.cutting.program import CompactedModel, Cut, Parameter
from pyro_bmr.cutting.rewriting import Pattern, Rewrites
from pyro_bmr.files.supports import pack_support, unpack_support
from pyro_bmr.graphs.sized_calls import MAKING
from pyro_bmr.programs.dry_run import find_modules


def pack_compacted(model: CompactedModel) -> dict[str, Any]:
    """Describe what is left of a model, without the program that it runs."""
    places = _places(model.model)
    tensors = []
    for key, original in model.originals.items():
        tensor = original(model.model)
        if id(tensor) not in places:
            msg = (
                f"the compacted model uses a part of a tensor of shape {tuple(tensor.shape)} that "
                "could not be found again. Expected it in a module that the model refers to: "
                "register it there as a buffer"
            )
            raise ValueError(msg)
        tensors.append({"place": places[id(tensor)], **_pack_smaller(model, key)})
    return {
        "shapes": {name: list(shape) for name, shape in model.shapes.items()},
        "sites": {name: list(kept) for name, kept in model.sites().items()},
        "plates": model.plates.by_site(),
        "rewrites": _pack_rewrites(model.rewrites),
        "tensors": tensors,
    }


def unpack_compacted(packed: Mapping[str, Any], model: Callable[..., Any]) -> CompactedModel:
    """Make the model that `pack_compacted` described, around its program in the state it had."""
    originals = {tuple(place): tensor for place, tensor in _tensors(model)}
    for one in packed["tensors"]:
        _check_part(one, originals.get(tuple(one["place"])))
    own = [originals[tuple(one["place"])] for one in packed["tensors"]]
    parameters = tuple(
        Parameter(one["parameter"], tensor, unpack_support(one["constraint"]))
        for tensor, one in zip(own, packed["tensors"], strict=True)
        if "parameter" in one
    )
    cut = Cut(
        {name: torch.Size(shape) for name, shape in packed["shapes"].items()},
        {name: tuple(kept) for name, kept in packed["sites"].items()},
        packed["plates"],
        # Whole at first, then what was left of each.
        tuple((tensor, ()) for tensor in own),
        parameters,
        _unpack_rewrites(packed["rewrites"]),
    )
    compacted = CompactedModel(model, cut)
    for key, one in zip(compacted.originals, packed["tensors"], strict=True):
        _smaller(compacted, key).data = one["value"]
    return compacted


def _pack_smaller(model: CompactedModel, key: str) -> dict[str, Any]:
    packed: dict[str, Any] = {"value": _smaller(model, key)}
    if key not in model.constants._buffers:
        # Parameters are held under keys; their names are in the same order.
        held = [k for k in model.originals if k not in model.constants._buffers]
        name = model.parameter_names[held.index(key)]
        constraint, _ = model.own._pyro_params[key]
        packed |= {
            "parameter": name,
            "constraint": pack_support(constraint, f"the parameter {name!r}"),
        }
    return packed


def _smaller(model: CompactedModel, key: str) -> Any:
    held: dict[str, Any] = model.constants._buffers
    own: PyroModule = model.own
    return held[key] if key in held else getattr(own, f"{key}_unconstrained")


def _check_part(packed: Mapping[str, Any], original: Tensor | None) -> None:
    part: Tensor = packed["value"]
    if original is None or not (
        part.dtype == original.dtype
        and part.dim() == original.dim()
        and all(a <= b for a, b in zip(part.shape, original.shape, strict=True))
    ):
        here = "none" if original is None else f"{original.dtype} {tuple(original.shape)}"
        msg = (
            "the file was saved for another model: it has a part of the shape "
            f"{tuple(part.shape)} and {part.dtype} of the tensor at {packed['place']}, which here "
            f"is {here}. Expected the model that the result was made with, built by the same code"
        )
        raise ValueError(msg)


def _places(model: Callable[..., Any]) -> dict[int, list[Any]]:
    """By identity, where a tensor is."""
    return {id(tensor): place for place, tensor in reversed(_tensors(model))}


def _tensors(model: Callable[..., Any]) -> list[tuple[list[Any], Tensor]]:
    found: list[tuple[list[Any], Tensor]] = []
    for i, module in enumerate(find_modules(model)):
        found += [([i, name], tensor) for name, tensor in module.named_parameters()]
        found += [([i, name], tensor) for name, tensor in module.named_buffers()]
    entries = pyro.get_param_store().named_parameters()
    return found + [(["store", name], tensor) for name, tensor in entries]


def _pack_rewrites(rewrites: Rewrites) -> list[Any]:
    return [
        [
            _find_name(function),
            [
                {
                    "sizes": [[list(place), size] for place, size in pattern.sizes.items()],
                    "changes": [
                        change
                        and {
                            "function": _find_name(change.function),
                            "values": [[list(place), v] for place, v in change.values.items()],
                        }
                        for change in pattern.changes
                    ],
                    "where": pattern.where,
                }
                for pattern in patterns
            ],
        ]
        for function, patterns in rewrites.items()
    ]


def _unpack_rewrites(packed: list[Any]) -> Rewrites:
    functions = {name: function for function, name in _function_names().items()}
    return {
        functions[name]: tuple(
            Pattern(
                _by_place(pattern["sizes"]),
                tuple(
                    change and Change(functions[change["function"]], _by_place(change["values"]))
                    for change in pattern["changes"]
                ),
                pattern["where"],
            )
            for pattern in patterns
        )
        for name, patterns in packed
    }


def _by_place(packed: list[Any]) -> dict[Any, Any]:
    return {
        tuple(place): tuple(value) if isinstance(value, list) else value for place, value in packed
    }


_HOMES = {"torch": torch, "Tensor": torch.Tensor, "functional": torch.nn.functional}


def _function_names() -> dict[Any, str]:
    """Name the functions of torch that take tensors, or make them by their sizes, and no others."""
    overridable = get_overridable_functions()
    makers = {getattr(torch, name): f"torch.{name}" for name in MAKING if hasattr(torch, name)}
    return makers | {
        function: f"{home}.{function.__name__}"
        for home, place in _HOMES.items()
        for function in overridable.get(place, ())
        if getattr(place, getattr(function, "__name__", ""), None) is function
    }


def _find_name(function: Any) -> str:
    names = _function_names()
    if function not in names:
        msg = (
            f"cannot save a compacted model whose program calls {function!r} with sizes of its "
            "own. Expected functions of torch"
        )
        raise ValueError(msg)
    return names[function]
