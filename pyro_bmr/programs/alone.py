"""Verbs run one at a time, and under no handlers of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar

from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.seed_messenger import SeedMessenger
from pyro.poutine.trace_messenger import TraceMessenger

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
            with _alone(verb):
                return function(*args, **kwargs)

        return call

    return decorate


_LOCK = RLock()
# Of the thread that holds the lock, the verbs that it is in.
_VERBS: list[str] = []
_ONLY_WATCH = (TraceMessenger, BlockMessenger, SeedMessenger)


@contextmanager
def _alone(verb: str) -> Iterator[None]:
    with _LOCK:
        outer = list(_PYRO_STACK)
        if not _VERBS:
            _check(verb, outer)
            _PYRO_STACK.clear()
        _VERBS.append(verb)
        try:
            yield
        finally:
            _VERBS.pop()
            _PYRO_STACK[:] = outer


def _check(verb: str, outer: list[object]) -> None:
    names = [type(one).__name__ for one in outer if not isinstance(one, _ONLY_WATCH)]
    if names:
        msg = (
            f"got {verb} inside of {', '.join(names)}, which would change what model and guide do, "
            "and in the end only here. Expected handlers around the model, as in "
            "poutine.condition(model, data=...), and the guide made for that model"
        )
        raise ValueError(msg)
