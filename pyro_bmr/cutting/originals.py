"""Tensors that a program uses, where they are now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pyro_bmr.programs.dry_run import find_modules

Original = Callable[[Any], Tensor]
"""From the model, or a copy of it, to a tensor that it uses."""


def find_original(model: Any, tensor: Tensor) -> Original:
    """Find where a program has a tensor from.

    Moving a module replaces its tensors, and copying it also the module itself.
    """
    for module in find_modules(model):
        for path, part in module.named_modules():
            for home in (part._parameters, part._buffers, vars(part)):
                name = next((key for key, value in home.items() if value is tensor), None)
                if name is None:
                    continue
                if module is model:
                    return _InModel(path, name)
                return _Held((part, name))
    return _Held((tensor, None))


class _InModel:
    """A tensor of a module that is copied with the compacted model."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name

    def __call__(self, model: nn.Module) -> Tensor:
        return _read(model.get_submodule(self.path), self.name)


class _Held:
    """A tensor, or its module, that a function refers to and that is not copied with it."""

    def __init__(self, place: tuple[Any, str | None]) -> None:
        self.place = place

    def __call__(self, _model: Any) -> Tensor:
        owner, name = self.place
        return owner if name is None else _read(owner, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


def _read(module: nn.Module, name: str) -> Tensor:
    for home in (module._parameters, module._buffers, vars(module)):
        value: Any = home.get(name)
        if value is not None:
            return value
    msg = f"the module {type(module).__name__} has lost its tensor {name!r}"
    raise AttributeError(msg)
