"""The arguments of a program as it can take them: data of any usual kind become tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_bmr.arguments.arrays import (
    check_tensor,
    is_array,
    is_number,
    read_rows,
    to_number,
    to_tensor,
)
from pyro_bmr.arguments.checks import read_keywords
from pyro_bmr.display import a_or_an
from pyro_bmr.programs.calls import check_call
from pyro_bmr.programs.dry_run import dry_run, find_modules
from pyro_bmr.programs.failures import ALL_DATA, running
from pyro_bmr.programs.given_values import (
    PriorMessenger,
    RowMessenger,
    ValueMessenger,
    refuse,
)
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.site_kinds import is_latent

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Rows that a program is tried on.
_FEW = 2


def read_data(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any) -> Arguments:
    """Turn data among the arguments into tensors, and check that the programs run with them.

    See `convert_data`. A TypeError says that the model has other parameters; any other error of a
    program has a note that says what it was called with.
    """  # noqa: DOC201
    data = convert_data(model, guide, args, kwargs)
    if (data[0] or data[1]) and not _runs(model, _callable(guide), data):
        if model is not None:
            check_call(model, *data)
        named = running("the model and its guide", *data)
        with explained_refusals(model, guide, *data), named:
            _run(model, data, _callable(guide), refuse(ALL_DATA))
    return data


def convert_data(model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any) -> Arguments:
    """Turn data among the arguments into tensors of the dtype and device of a guide.

    That is arrays and tables of other libraries, numbers of other types, and lists with a number
    for each row that the model does not run with. Whole numbers stay whole, and tensors as they
    are, unless the program runs only with them as floats of that dtype, there. What holds no
    numbers is a ValueError.
    """  # noqa: DOC201, DOC501
    keywords = read_keywords(kwargs)
    given = _Given.read(args, keywords)
    if not given.has_data:
        return args, keywords
    kind = _find_kind(guide) or _find_kind(model)
    if kind is None:
        kind = _Kind(torch.get_default_dtype(), None)
        if given.has_others(kind):
            kind = _Kind(_find_dtype(model, given.convert(kind)) or kind.dtype, None)
    if not given.has_others(kind):
        return args, keywords
    if model is not None and given.has_lists:
        with_lists = given.convert(kind, lists=False)
        if _runs(model, _callable(guide), with_lists):
            return with_lists
    return _fit(model, guide, given.convert(kind), kind)


@dataclass(frozen=True)
class _Kind:
    """Of numbers: their dtype, and where they are; None for torch's default."""

    dtype: torch.dtype
    device: torch.device | None

    def has(self, tensor: Tensor) -> bool:
        here = self.device is None or tensor.device == self.device
        return tensor.dtype == self.dtype and here

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.to(tensor.device if self.device is None else self.device, self.dtype)


@dataclass(frozen=True)
class _Given:
    """Arguments as a user gave them, and how many rows their arrays have, if any has some."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: int | None

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Given:
        places = (*enumerate(args), *kwargs.items())
        for key, value in places:
            if isinstance(value, DataLoader | Dataset):
                msg = (
                    f"got {a_or_an(value)} as argument {key!r}. Expected arrays or "
                    "tensors: fit, prune and reduce alone read data a batch at a time, and take a "
                    "loader as the only argument"
                )
                raise TypeError(msg)
        arrays = [(f"argument {key!r}", one) for key, value in places for one in _arrays(value)]
        for place, one in arrays:
            if isinstance(one, Tensor):
                check_tensor(one, place)
        shapes = [tuple(shape) for _, one in arrays if (shape := getattr(one, "shape", ()))]
        rows = [shape[0] for shape in shapes]
        if rows and not any(rows):
            msg = f"got data of shapes {shapes}, without any rows. Expected one row or more"
            raise ValueError(msg)
        return cls(args, kwargs, max(rows, default=None))

    @property
    def has_data(self) -> bool:
        places = (*self.args, *self.kwargs.values())
        return self.rows is not None or any(map(self._is_other, places))

    def has_others(self, kind: _Kind) -> bool:
        """Tell whether anything is no tensor of a kind."""
        places = (*self.args, *self.kwargs.values())
        tensors = (one for value in places for one in _arrays(value) if isinstance(one, Tensor))
        return any(map(self._is_other, places)) or not all(map(kind.has, tensors))

    @property
    def has_lists(self) -> bool:
        places = (*self.args, *self.kwargs.values())
        return any(self._rows(one) is not None for value in places for one in _walk(value))

    def convert(self, kind: _Kind, *, lists: bool = True) -> Arguments:
        def take(value: Any, place: str) -> Any:
            if is_array(value):
                return to_tensor(value, place, kind.dtype, kind.device)
            if is_number(value):
                return to_number(value)
            if (rows := self._rows(value)) is not None:
                return to_tensor(rows, place, kind.dtype, kind.device) if lists else value
            return _map_parts(partial(take, place=place), value)

        args = tuple(take(value, f"argument {i}") for i, value in enumerate(self.args))
        return args, {key: take(one, f"argument {key!r}") for key, one in self.kwargs.items()}

    def _is_other(self, value: Any) -> bool:
        return any(
            is_array(one) or is_number(one) or self._rows(one) is not None for one in _walk(value)
        )

    def _rows(self, value: Any) -> Any:
        """Read a list that has a number, or a list of them, for each row."""
        if not isinstance(value, list) or len(value) != (self.rows or len(value)):
            return None
        return read_rows(value)


def _arrays(value: Any) -> Iterator[Any]:
    return (one for one in _walk(value) if isinstance(one, Tensor) or is_array(one))


def _walk(value: Any) -> Iterator[Any]:
    """Walk through a value and all that is in it, where that is a mapping, a list or a tuple."""
    yield value
    yield from (one for part in _parts(value) for one in _walk(part))


def _parts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(value.values())
    return tuple(value) if type(value) in {list, tuple} or _is_named_tuple(value) else ()


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_make")


def _map_parts(function: Callable[[Any], Any], value: Any) -> Any:
    """Change what is in a value; the value itself, if nothing in it changes."""
    before = _parts(value)
    after = [function(one) for one in before]
    if all(new is old for new, old in zip(after, before, strict=True)):
        return value
    if isinstance(value, dict):
        changed = copy(value)
        changed.update(zip(value, after, strict=True))
        return changed
    return value._make(after) if _is_named_tuple(value) else type(value)(after)


def _find_kind(program: Any) -> _Kind | None:
    """Find the dtype and the device of the first parameter, buffer or sample of a program."""
    modules = find_modules(program)
    held = [*(m.parameters() for m in modules), *(m.buffers() for m in modules)]
    samples = _arrays(dict(program)) if isinstance(program, Mapping) else ()
    tensors = chain(*held, samples)
    floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
    return next((_Kind(t.dtype, t.device) for t in floats), None)


def _find_dtype(model: Any, data: Arguments) -> torch.dtype | None:
    """Find the dtype of the first latent site of a model, though it may not run to its end."""
    found = _FirstDtype()
    with suppress(Exception):
        _run(found(model), data)
    return found.dtype


class _FirstDtype(Messenger):
    dtype: torch.dtype | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if self.dtype is None and floating and is_latent(msg):
            self.dtype = value.dtype


def _fit(model: Any, guide: Any, data: Arguments, kind: _Kind) -> Arguments:
    """Return the first form of the data that a program runs with: as it is, or of a kind."""

    def floats(tensor: Tensor) -> Tensor:
        return kind.take(tensor) if tensor.is_floating_point() else tensor

    def all_real(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_complex() else kind.take(tensor)

    for form in (data, _map(floats, data), _map(all_real, data)):
        if _runs(model, _callable(guide), form):
            return form
    return data


def _callable(guide: Any) -> Any:
    """Return a guide that can be run; None for samples, and before the first call."""
    # An autoguide that was never called would learn its sites from a call.
    never_called = isinstance(guide, AutoGuide) and guide.prototype_trace is None
    return guide if callable(guide) and not never_called else None


def _runs(model: Any, guide: Any, data: Arguments) -> bool:
    """Tell whether programs run with data, with few rows of them or else with all."""
    sizes = [len(one) for one in _arrays(list(data)) if one.dim()]
    few = _map(lambda one: one[:_FEW] if one.dim() and len(one) == max(sizes) else one, data)
    for form in (few, data):
        try:
            _run(model, form, guide)
        except Exception:
            continue
        return True
    return False


def _run(
    model: Any,
    data: Arguments,
    guide: Any = None,
    fit: Callable[[Tensor, Any], Tensor] | None = None,
) -> None:
    """Run a model at what its guide draws, or else its prior; ``fit`` as in `ValueMessenger`."""
    args, kwargs = data
    with poutine.block(), dry_run(model, guide), torch.no_grad(), PriorMessenger(*args, **kwargs):
        torch.manual_seed(0)
        if guide is not None:
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            rows, values = {}, {}
            for name, node in drawn.iter_stochastic_nodes():
                if not site_is_subsample(node):
                    values[name] = node["value"]
                elif len(node["value"]) < node["fn"].size:
                    rows[name] = node["value"]
            model = model and RowMessenger(rows)(ValueMessenger(values, fit)(model))
        if model is not None:
            poutine.trace(model).get_trace(*args, **kwargs).compute_log_prob()


def _map(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    if isinstance(data, Tensor):
        return function(data)
    return _map_parts(partial(_map, function), data)
