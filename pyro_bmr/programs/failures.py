"""Programs of users that fail: errors that say with what, and what was expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyro_bmr.arguments.checks import show

ALL_DATA = "all of its data, as when it was trained"


@contextmanager
def running(
    what: str, args: Sequence[Any], kwargs: Mapping[str, Any], expected: str = ALL_DATA
) -> Iterator[None]:
    """Turn an error of a program into a RuntimeError that says how the program was called.

    One that says itself what was expected stays as it is.
    """
    try:
        yield
    except Exception as error:
        if "Expected" in str(error) and isinstance(error, TypeError | ValueError):
            raise
        told = [
            f"argument {key!r}: {show(one)}" for key, one in (*enumerate(args), *kwargs.items())
        ]
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        msg = (
            f"{what} could not be run with {', '.join(told) or 'no arguments'} ({reason}). "
            f"Expected {expected}"
        )
        raise RuntimeError(msg) from error
