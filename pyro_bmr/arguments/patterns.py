"""Names that users pass for one or for many: exact ones, fields and patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn


def find_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the names that are meant by a name, a field or a pattern, in the order of ``known``.

    An exact name goes first. A field, as ``A`` or ``A{1}`` of ``A{1}(2,3)``, is what comes before
    a bracket. In a pattern ``*`` stands for any text, ``?`` for a letter.
    """
    known = list(known)
    if name in known:
        return [name]
    meant = {*match_names(name, known)}
    return [one for one in known if one in meant or _is_of_field(one, name)]


def match_names(pattern: str, known: Iterable[str]) -> list[str]:
    """Return the names that a pattern matches: ``*`` stands for any text, ``?`` for a letter."""
    parts = ({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern)
    matches = re.compile("".join(parts), re.DOTALL).fullmatch
    return [name for name in known if matches(name)]


def field(name: str) -> str:
    """Return what comes before the index: ``A`` of ``A(2,1)`` or ``A[2,1]``."""
    return re.split(r"[(\[]", name, maxsplit=1)[0].strip() or name


def refuse_name(place: str, name: object, known: Iterable[str], expected: str) -> NoReturn:
    """Raise the ValueError for a name that is not known; it says which are alike."""
    known = list(known)
    msg = f"got {name!r} in {place}. Expected {expected} of {list_some(known)}"
    raise ValueError(msg + suggest(str(name), known))


def list_some(known: Sequence[str]) -> str:
    """List some names, and dots for the others."""
    return ", ".join(map(repr, known[:_LISTED])) + (", ..." if len(known) > _LISTED else "")


def suggest(name: str, known: Sequence[str]) -> str:
    """Say which names are near to one that is not known."""
    near = difflib.get_close_matches(name, known, 3) if len(known) <= _MANY else []
    return f". Did you mean {' or '.join(map(repr, near))}?" if near else ""


# So many names are compared to one that is not known, and so many are listed.
_MANY, _LISTED = 20_000, 12


def _is_of_field(name: str, field: str) -> bool:
    return bool(field) and name.startswith(field) and name[len(field) : len(field) + 1] in _OPENING


_OPENING = ("(", "[", "{")
