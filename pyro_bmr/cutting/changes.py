"""How a call that says sizes is made in the program without some units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.graphs.sized_calls import RECURRENT

Place = tuple[int | str, int | None]
"""Of an argument by position or name, the whole, or an item of it."""


@dataclass(frozen=True)
class Change:
    """How a call is made in the smaller program: of which function, with what at which places."""

    function: Any
    values: Mapping[Place, Any]


Stays = Callable[[Any], tuple[Tensor, ...]]
"""From a node of the graph to a boolean tensor per axis, True for the indices that stay."""


def change_call(call: Any, stays: Stays) -> Change | None:
    """Find how a call is made once some units are gone; None if as before.

    A ValueError says that it cannot be made with other sizes.
    """
    masks = [stays(node) for node in (*call.nodes, *call.operands)]
    if all(bool(mask.all()) for axes in masks for mask in axes):
        return None
    results, operands = masks[: len(call.nodes)], masks[len(call.nodes) :]
    rule = REWRITING_RULES.get(_name(call.function))
    if rule is None:
        if _name(call.function) not in RECURRENT:
            _refuse(call, results)
        return None
    change = rule(call, results, operands)
    said = dict(find_sizes(call.args, call.kwargs))
    values = {place: value for place, value in change.values.items() if said[place] != value}
    if _name(call.function) in {"view", "reshape"} and len(values) == 1 and -1 not in said.values():
        # The size may be that of units times that of data, such as batch * heads.
        values = dict.fromkeys(values, -1)
    return Change(change.function, values) if values else None


def _refuse(call: Any, results: list[tuple[Tensor, ...]]) -> None:
    if any(not bool(mask.all()) for axes in results for mask in axes):
        msg = f"the program calls {_name(call.function)} on units that go, with sizes of its own"
        raise ValueError(msg)


def _says_shape(call: Any, results: Any, _operands: Any) -> Change:
    """Rewrite the trailing axes of the result: view, expand, zeros."""
    (axes,) = results or [()]
    places = _size_places(call)
    left = zip(reversed(places), reversed(axes), strict=False)
    return Change(
        call.function, {place: int(mask.sum()) for (place, size), mask in left if size == len(mask)}
    )


def _unflatten(call: Any, results: Any, operands: Any) -> Change:
    ((before,), (axes,)) = operands, results
    dim = _argument(call, 1, "dim")
    sizes = _size_places(call)
    start = dim if dim >= 0 else dim + len(before)
    part = axes[start : start + len(sizes)]
    pairs = zip(sizes, part, strict=True)
    return Change(
        call.function, {place: int(m.sum()) for (place, size), m in pairs if size == len(m)}
    )


def _repeat(call: Any, results: Any, operands: Any) -> Change:
    ((before,), (axes,)) = operands, results
    places = _size_places(call)
    values = {}
    for number, ((place, _), mask) in enumerate(
        zip(reversed(places), reversed(axes), strict=False), 1
    ):
        size = int(before[-number].sum()) if number <= len(before) else 1
        if int(mask.sum()) % size:
            msg = "the program repeats units, of which not all copies go"
            raise ValueError(msg)
        values[place] = int(mask.sum()) // size
    return Change(call.function, values)


def _split(call: Any, results: Any, _operands: Any) -> Change:
    """Say the size of each part, or one for all; a chunk into unequal parts becomes a split."""
    dim = _argument(call, 2, "dim", 0)
    sizes = tuple(int(axes[dim].sum()) for axes in results)
    said = dict(find_sizes(call.args, call.kwargs))
    name = _name(call.function).removeprefix("unsafe_")
    listed = [place for place in said if place[1] is not None]
    if name in {"split", "split_with_sizes"} and listed:
        return Change(call.function, dict(zip(listed, sizes, strict=True)))
    (place,) = [place for place in said if place not in {(2, None), ("dim", None)}]
    equal = len(set(sizes)) == 1
    if name == "split" and (equal or name == _name(call.function)):
        return Change(call.function, {place: sizes[0] if equal else sizes})
    if equal:
        return Change(call.function, {})
    if place[0] != 1:
        msg = f"the program calls {name} with its number by name, on units that go"
        raise ValueError(msg)
    return Change(torch.split, {place: sizes})


def _split_at(call: Any, results: Any, _operands: Any) -> Change:
    """Say where parts end; the number of parts stays where they are equal."""
    name, axes = _name(call.function), results[0]
    dims = {"hsplit": min(1, len(axes) - 1), "vsplit": 0, "dsplit": 2}
    dim = dims.get(name, _argument(call, 2, "dim", 0))
    sizes = [int(axes[dim].sum()) for axes in results]
    ends = tuple(accumulate(sizes))[:-1]
    said = [place for place, _ in find_sizes(call.args, call.kwargs)]
    listed = [place for place in said if place[1] is not None]
    if listed:
        return Change(call.function, dict(zip(listed, ends, strict=True)))
    (place,) = [place for place in said if place not in {(2, None), ("dim", None)}]
    return Change(call.function, {} if len(set(sizes)) == 1 else {place: ends})


def _narrow(call: Any, results: Any, operands: Any) -> Change:
    ((before,), (axes,)) = operands, results
    dim, start = _argument(call, 1, "dim"), _argument(call, 2, "start")
    first = int(before[dim][:start].sum())
    places = [(2, None) if len(call.args) > 2 else ("start", None)]
    places.append((3, None) if len(call.args) > 3 else ("length", None))
    return Change(call.function, dict(zip(places, (first, int(axes[dim].sum())), strict=True)))


def _slice(call: Any, _results: Any, operands: Any) -> Change:
    """Move the bounds of slices along axes of which units go."""
    before = operands[0]
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    # Tensors are left out of the arguments: what is assigned, and those of the index.
    tensors = len(operands) - 1 - (call.args[2:] == (None,))
    taken = sum(item is not None and item is not Ellipsis for item in index)
    values: dict[Place, Any] = {}
    axis = 0
    for number, item in enumerate(index):
        if item is Ellipsis:
            axis += len(before) - taken
        elif item is not None:
            stays = before[axis]
            axis += 1
            if not isinstance(item, slice) or bool(stays.all()):
                continue
            first, last, step = item.indices(len(stays))
            if step != 1 or tensors > 0:
                msg = f"the program takes {item} of units of which some go"
                raise ValueError(msg)
            start = None if item.start is None else int(stays[:first].sum())
            stop = None if item.stop is None else int(stays[: max(first, last)].sum())
            place: Place = (1, number if isinstance(call.args[1], tuple) else None)
            values[place] = slice(start, stop, item.step)
    return Change(call.function, values)


def _convolution(call: Any, results: Any, _operands: Any) -> Change:
    (axes,) = results
    groups = _argument(call, 6, "groups", 1)
    channels = axes[-1 - int(_name(call.function)[-2])]
    share = len(channels) // groups
    whole = channels.reshape(groups, share)
    if not bool((whole.any(1) == whole.all(1)).all()):
        msg = f"the program calls {_name(call.function)} with groups of which only a part goes"
        raise ValueError(msg)
    place: Place = (6, None) if len(call.args) > 6 else ("groups", None)
    return Change(call.function, {place: int(whole.all(1).sum())})


REWRITING_RULES: dict[str, Callable[..., Change]] = {
    **dict.fromkeys(
        (
            "view", "reshape", "expand", "broadcast_to", "zeros", "ones", "full", "empty", "rand",
            "randn", "normal", "new_zeros", "new_ones", "new_full", "new_empty", "layer_norm",
            "rms_norm",
        ),
        _says_shape,
    ),
    **dict.fromkeys(
        (
            "split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes",
            "unsafe_chunk",
        ),
        _split,
    ),
    **dict.fromkeys(("tensor_split", "hsplit", "vsplit", "dsplit"), _split_at),
    **dict.fromkeys(
        (f"conv{transpose}{n}d" for transpose in ("", "_transpose") for n in (1, 2, 3)),
        _convolution,
    ),
    "__getitem__": _slice,
    "__setitem__": _slice,
    "repeat": _repeat,
    "tile": _repeat,
    "narrow": _narrow,
    "unflatten": _unflatten,
}  # fmt: skip
"""By name of a torch function, how a call is made with other sizes."""


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _argument(call: Any, position: int, name: str, default: Any = None) -> Any:
    if len(call.args) > position:
        return call.args[position]
    return call.kwargs.get(name, default)


def _size_places(call: Any) -> list[tuple[Place, int]]:
    """Find where a call says a shape: the items of a sequence, or all numbers."""
    found = list(find_sizes(call.args, call.kwargs))
    listed = [(place, size) for place, size in found if place[1] is not None]
    return listed or [(place, size) for place, size in found if isinstance(place[0], int)]


def find_sizes(args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Find the integers and slices that a call says, and at which places.

    >>> list(find_sizes((None, (2, 3)), {"dim": -1}))
    [((1, 0), 2), ((1, 1), 3), (('dim', None), -1)]
    """
    arguments: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in arguments:
        if type(value) in _SAYS_SIZE:
            yield (key, None), value
        elif isinstance(value, tuple | list):
            for number, item in enumerate(value):
                if type(item) in _SAYS_SIZE:
                    yield (key, number), item


_SAYS_SIZE = (int, slice)
