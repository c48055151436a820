"""Modules around a user's model: of pruning, of other priors, of smaller tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import Signature, signature
from typing import Any

from torch import nn


class ModelWrapper(nn.Module):
    """Abstract: a Pyro model that is called like the ``model`` inside, which is shared.

    What it has not is read from that model, but for what Python looks up on every object.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        """Return what the model inside has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)


_Kinds = type[ModelWrapper] | tuple[type[ModelWrapper], ...]


def find_wrappers(model: Any, kinds: _Kinds = ModelWrapper) -> Iterator[ModelWrapper]:
    """Yield what stands around the user's model, from the outside in, as long as it is of kinds."""
    inner = model
    while isinstance(inner, kinds):
        yield inner
        inner = inner.model


def unwrap(model: Any, kinds: _Kinds = ModelWrapper) -> Any:
    """Return what is inside of all wrappers, or of those of some kinds."""
    for wrapper in find_wrappers(model, kinds):
        model = wrapper.model
    return model


def read_signature(model: Callable[..., Any]) -> Signature:
    """Read what the user's model takes, under whatever this package put around it."""
    program = unwrap(model)
    return signature(getattr(program, "forward", program))
