"""The sizes that a program writes out, in the program without some units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_bmr.cutting.changes import Change, Place, Stays, change_call, find_sizes


@dataclass(frozen=True)
class Pattern:
    """Calls of a function that say the same sizes.

    A size is None for any number in a call without -1. ``changes`` has one item per such call, in
    the order of the run; ``where`` is their place in the program, empty for those not seen.
    """

    sizes: Mapping[Place, Any]
    changes: tuple[Change | None, ...]
    where: str = ""

    def fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Tell whether a call says these sizes."""
        said = dict(find_sizes(args, kwargs))
        if None in self.sizes.values() and -1 in said.values():
            return False
        return all(
            place in said and size in (None, said[place]) for place, size in self.sizes.items()
        )


Rewrites = Mapping[Any, tuple[Pattern, ...]]
"""By function, the patterns of its calls that change."""


class Rewriter:
    """Makes the calls of one run with other sizes."""

    def __init__(self, rewrites: Rewrites) -> None:
        self.rewrites = rewrites
        self.places = {(f, pattern.where) for f, found in rewrites.items() for pattern in found}
        self.seen: Counter[int] = Counter()

    def __call__(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
    ) -> Any:
        """Call a function as the smaller program does."""
        where = where if (function, where) in self.places else ""
        for pattern in self.rewrites.get(function, ()):
            if pattern.where == where and pattern.fits(args, kwargs):
                change = self._next(function, pattern)
                if change is not None:
                    args, kwargs = _changed(args, kwargs, change)
                    return change.function(*args, **kwargs)
                break
        return function(*args, **kwargs)

    def _next(self, function: Any, pattern: Pattern) -> Change | None:
        first = pattern.changes[0]
        if all(change == first for change in pattern.changes):
            return first
        number = self.seen[id(pattern)]
        self.seen[id(pattern)] += 1
        if number >= len(pattern.changes):
            msg = (
                f"the compacted model calls {function.__name__} with the sizes "
                f"{list(pattern.sizes.values())} {number + 1} times, of which "
                f"{len(pattern.changes)} were seen when it was made, where they became different "
                "sizes. Expected a program that runs the same operations for all arguments"
            )
            raise RuntimeError(msg)
        return pattern.changes[number]


def plan_rewrites(calls: list[Any], stays: Stays) -> Rewrites:
    """Find the sizes that a program has to say once some units are gone; fails as `change_call`."""
    found = [(call, change_call(call, stays)) for call in calls]
    rewrites: dict[Any, tuple[Pattern, ...]] = {}
    for function in dict.fromkeys(call.function for call, change in found if change is not None):
        own = [(call, change) for call, change in found if call.function is function]
        everywhere = _find_patterns(own, "")
        for where in dict.fromkeys(call.where for call, _ in own):
            here = [(call, change) for call, change in own if call.where == where]
            # Where nothing changes, nothing does whatever the sizes are.
            everywhere += _find_patterns(here, where) or [Pattern({}, (None,), where)]
        rewrites[function] = tuple(everywhere)
    return rewrites


def _find_patterns(calls: list[tuple[Any, Change | None]], where: str) -> list[Pattern]:
    sizes: list[dict[Place, Any]] = []
    for call, change in calls:
        if change is not None:
            said = dict(find_sizes(call.args, call.kwargs))
            pattern = {
                place: None if where and value == -1 else said[place]
                for place, value in change.values.items()
            }
            if pattern not in sizes:
                sizes.append(pattern)
    # A call belongs to the first pattern that it fits: the one that says most.
    sizes.sort(key=len, reverse=True)
    changes: list[list[Change | None]] = [[] for _ in sizes]
    for call, change in calls:
        fits = (Pattern(p, ()).fits(call.args, call.kwargs) for p in sizes)
        number = next((i for i, fit in enumerate(fits) if fit), None)
        if number is not None:
            free = None in sizes[number].values()
            # What torch finds by itself is right in all calls.
            changes[number].append(
                Change(call.function, dict.fromkeys(sizes[number], -1)) if free else change
            )
    return [Pattern(p, tuple(c), where) for p, c in zip(sizes, changes, strict=True)]


def _changed(args: tuple[Any, ...], kwargs: Mapping[str, Any], change: Change) -> Any:
    new_args, new_kwargs = list(args), dict(kwargs)
    for (key, number), value in change.values.items():
        home: Any = new_args if isinstance(key, int) else new_kwargs
        if number is None:
            home[key] = value
        else:
            items = list(home[key])
            items[number] = value
            home[key] = tuple(items)
    return new_args, new_kwargs
