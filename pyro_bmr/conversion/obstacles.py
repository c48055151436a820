"""What cannot be converted, and what to do about it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from pyro_bmr.arguments.checks import refuse_kind
from pyro_bmr.conversion.layers import LOOKUPS, NOT_BAYESIAN, trainable_parameters
from pyro_bmr.display import a_or_an


def check_module(module: Any, layers: tuple[type[nn.Module], ...]) -> None:
    """Refuse what cannot be converted."""
    if not isinstance(module, nn.Module):
        msg = f"bayesianize got {a_or_an(module)}. Expected a torch.nn.Module"
        raise TypeError(msg)
    if (
        not isinstance(layers, tuple)
        or not all(isinstance(layer, type) for layer in layers)
        or not layers
    ):
        refuse_kind("layers", layers, "a tuple of types, such as pyro_bmr.nn.LAYERS")
    asked = [layer for layer in module.modules() if isinstance(layer, layers)]
    known = {id(parameter) for layer in asked for parameter in layer.parameters(recurse=False)}
    for path, layer in module.named_modules():
        obstacle = _obstacle(layer, known)
        if obstacle:
            place = f"{path!r}, a" if path else "a"
            msg = f"bayesianize got {place} {type(layer).__name__} that {obstacle}"
            raise ValueError(msg)
    if not any(trainable_parameters(layer) for layer in asked):
        names = ", ".join(layer.__name__ for layer in layers)
        msg = (
            f"bayesianize got {a_or_an(module)} in which no layer of layers= has trainable "
            f"parameters. Expected some of {names}; unfreeze them, or name other types in layers="
        )
        raise ValueError(msg)


def _obstacle(layer: Any, known: set[int]) -> str | None:
    """Say why a module cannot be converted, and what to do about it, if so."""
    if any(map(is_lazy, (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))):
        return "is lazy. Run it once on a batch, so that its parameters get their shapes"
    if is_parametrized(layer):
        return (
            f"computes its {', '.join(layer.parametrizations)} from other parameters. Call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    trainable = trainable_parameters(layer)
    for key, _ in trainable:
        stem = key.rpartition("_")[0]
        if isinstance(vars(layer).get(stem), Tensor):
            return (
                f"computes its {stem} from {key} in a hook (weight norm, spectral norm, pruning). "
                "Remove the hook first, as by torch.nn.utils.prune.remove"
            )
    if trainable and isinstance(layer, LOOKUPS) and layer.max_norm is not None:
        return (
            f"rescales its weight in place (max_norm={layer.max_norm}), which would change the "
            "draws. Set max_norm=None"
        )
    own = [key for key, parameter in trainable if id(parameter) not in known]
    if own and not isinstance(layer, NOT_BAYESIAN):
        return (
            f"has parameters of its own ({', '.join(own)}) and is not among layers=. If its "
            f"forward reads them as attributes (self.{own[0]}), pass layers=(*pyro_bmr.nn.LAYERS, "
            f"{type(layer).__name__}); otherwise build it from layers that are "
            "(torch.nn.GRUCell for torch.nn.GRU), or freeze it with requires_grad_(False)"
        )
    return None
