"""A program inside of Pyro's handlers and of arguments that are bound to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.messenger import Messenger, _bound_partial, _context_wrap

from pyro_bmr.programs.wrappers import unwrap

# They change what others see of a program, not what it draws.
_TRANSPARENT = (BlockMessenger, InferConfigMessenger)


@dataclass(frozen=True)
class Wrapped:
    """A program, the handlers around it from the outside in, and the arguments bound to it."""

    program: Any
    handlers: tuple[Messenger, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def is_transparent(self) -> bool:
        """Whether the program inside draws what the whole draws."""
        return all(isinstance(handler, _TRANSPARENT) for handler in self.handlers)

    def around(self, program: Any) -> Any:
        """Put the same handlers and arguments around another program."""
        for handler in reversed(self.handlers):
            program = handler(program)
        return partial(program, *self.args, **self.kwargs) if self.args or self.kwargs else program


def peel(program: Any) -> Wrapped:
    """Take off the handlers of `pyro.poutine` and every `functools.partial`.

    >>> from pyro import poutine
    >>> wrapped = peel(partial(poutine.scale(print, 0.5), 1, end=""))
    >>> wrapped.program, wrapped.args, wrapped.kwargs, len(wrapped.handlers)
    (<built-in function print>, (1,), {'end': ''}, 1)
    """
    handlers: list[Messenger] = []
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    while isinstance(program, partial):
        layer = program.func if isinstance(program, _bound_partial) else program
        bound, program = layer.args, layer.func
        if program is _context_wrap:
            handler, program, *bound = bound
            handlers.append(handler)
        args, kwargs = (*bound, *args), {**layer.keywords, **kwargs}
    return Wrapped(program, tuple(handlers), args, kwargs)


def is_same_program(one: Any, other: Any) -> bool:
    """Tell whether two draw the same, whatever is hidden or pruned of either."""
    if not (callable(one) and callable(other)):
        return False
    first, second = (peel(unwrap(program)) for program in (one, other))
    transparent = first.is_transparent and second.is_transparent
    return transparent and bool(_identity(first) == _identity(second))


def _identity(wrapped: Wrapped) -> tuple[Any, list[int], dict[str, int]]:
    kwargs = {name: id(value) for name, value in wrapped.kwargs.items()}
    return unwrap(wrapped.program), list(map(id, wrapped.args)), kwargs
