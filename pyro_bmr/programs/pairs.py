"""Models with their guides, as users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger

from pyro_bmr.display import a_or_an
from pyro_bmr.programs.many_processes import check_one_process
from pyro_bmr.programs.wrapped import is_same_program, peel
from pyro_bmr.programs.wrappers import ModelWrapper

Pair = tuple[Callable[..., Any], Callable[..., Any]]

_PAIR = "Expected a pair: what reduce or prune returned, or (model, guide)"
_PAIRS = (
    f"{_PAIR}; or a mapping from names to pairs, such as "
    "{'full': (model, guide), 'reduced': result}"
)


def read_pairs(pairs: Any) -> dict[str, Pair]:
    """Read pairs by name; one alone is called ``"model"``."""
    if isinstance(pairs, Mapping) and not pairs:
        msg = f"got no models. {_PAIRS}"
        raise ValueError(msg)
    if not isinstance(pairs, Mapping):
        return {"model": read_pair(pairs, expected=_PAIRS)}
    return {name: read_pair(value, f" as {name!r}", _PAIRS) for name, value in pairs.items()}


def read_pair(value: Any, place: str = "", expected: str = _PAIR) -> Pair:
    """Read a model and its guide: a tuple of both, or what has ``.model`` and ``.guide``."""
    if isinstance(value, tuple | list) and len(value) == 2:
        model, guide = value
    else:
        model, guide = (getattr(value, what, None) for what in ("model", "guide"))
    if not (callable(model) and callable(guide)) or isinstance(value, torch.nn.Module):
        msg = f"got {a_or_an(value)}{place}. {expected}"
        raise TypeError(msg)
    check_guide(model, guide)
    return model, guide


def check_programs(verb: str, model: Any, guide: Any) -> None:
    """Raise a TypeError if what a verb was given are no programs, but a result and data, say."""
    if not (callable(model) and callable(guide)):
        msg = (
            f"{verb} got {a_or_an(model)} and {a_or_an(guide)}. Expected a model "
            f"and its guide, as in {verb}(model, guide, x, y), or of a result, "
            f"{verb}(result.model, result.guide, x, y)"
        )
        raise TypeError(msg)
    check_guide(model, guide)


def check_guide(model: Any, guide: Any) -> None:
    """Raise a TypeError if a guide is a class, a model, or one that many processes train."""
    for what, one in (("model", model), ("guide", guide)):
        if isinstance(one, type):
            msg = (
                f"got the class {one.__name__} in the place of the {what}. Expected one that was "
                f"made from it, such as {one.__name__}({'' if what == 'model' else 'model'})"
            )
            raise TypeError(msg)
    if isinstance(peel(model).program, AutoGuide | GuideMessenger):
        msg = (
            f"got {a_or_an(peel(model).program)} in the place of the model. Expected the "
            "model, and the guide after it or as guide="
        )
        raise TypeError(msg)
    if isinstance(peel(guide).program, ModelWrapper) or is_same_program(model, guide):
        raise TypeError(MODEL_AS_GUIDE)
    check_one_process(guide)


MODEL_AS_GUIDE = (
    "got the model in the place of the guide, whose posterior would be the prior. Expected a guide "
    "that was trained for this model, such as AutoNormal(model) after training, or result.guide "
    "of a reduction"
)
