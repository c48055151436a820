"""Verbs run one at a time, and under no handlers of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock, get_ident
from traceback import clear_frames
from typing import ParamSpec, TypeVar

from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.seed_messenger import SeedMessenger
from pyro.poutine.trace_messenger import TraceMessenger

from pyro_bmr.display import hide_frames
from pyro_bmr.programs.process_state import ProcessState

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def alone(
    verb: str,
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Let a verb have Pyro's handlers and its param store, which a process has once, to itself.

    Verbs of other threads wait. Handlers that only watch are set aside; those that would change
    what a model or a guide does are a ValueError. Whatever stops the verb, the handlers are after
    it what they were before.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @wraps(function)
        def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            try:
                with hold(verb):
                    return function(*args, **kwargs)
            except Exception as error:
                hide_frames(error)
                raise

        return call

    return decorate


_LOCK = RLock()
# The thread that is inside a verb.
_OWNER: int | None = None
_ONLY_WATCH = (TraceMessenger, BlockMessenger, SeedMessenger)


@contextmanager
def hold(verb: str) -> Iterator[None]:
    """Be alone in a block."""
    global _OWNER  # noqa: PLW0603
    with _LOCK:
        before, owner = ProcessState.now(), _OWNER
        _check(verb, before.handlers)
        try:
            _OWNER = get_ident()
            _PYRO_STACK.clear()
            yield
        except KeyboardInterrupt as interrupt:
            # Blocks that it stopped as they ended are ended now, not when it is forgotten.
            clear_frames(interrupt.__traceback__)
            raise
        finally:
            before.restore()
            _OWNER = owner


def _start_anew() -> None:
    """Free a forked process of a verb in a thread that it does not have."""
    global _LOCK, _OWNER  # noqa: PLW0603
    if get_ident() != _OWNER:
        if _OWNER is not None:
            _PYRO_STACK.clear()
        _LOCK, _OWNER = RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def _check(verb: str, outer: list[object]) -> None:
    names = [type(one).__name__ for one in outer if not isinstance(one, _ONLY_WATCH)]
    if names:
        msg = (
            f"got {verb} inside of {', '.join(names)}, which would change what model and guide do, "
            "and in the end only here. Expected handlers around the model, as in "
            "poutine.condition(model, data=...), and the guide made for that model"
        )
        raise ValueError(msg)
