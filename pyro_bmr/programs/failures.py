"""Programs of users that fail: their errors, with a note that says how they were called."""

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
    """Add to an error of a program what it was called with, and what was expected.

    The error is the user's own, and stays what it is. One that says itself what was expected, as
    those of this package do, gets no note.
    """
    try:
        yield
    except Exception as error:
        if "Expected" not in str(error):
            places = (*enumerate(args), *kwargs.items())
            told = [f"argument {key!r}: {show(one)}" for key, one in places]
            got = ", ".join(told) or "no arguments"
            error.add_note(f"{what} could not be run with {got}. Expected {expected}")
        raise
