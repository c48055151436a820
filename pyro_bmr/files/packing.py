"""A model and its guide as plain data, and back around the user's model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pyro_bmr.files.guides import pack_guide, unpack_guide
from pyro_bmr.files.models import (
    SiteRecorder,
    check_equal,
    load_state,
    pack_handlers,
    pack_state,
    run_recorded,
    unpack_handlers,
)
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide


def pack_program(
    model: Callable[..., Any],
    guide: PrunedGuide,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe the model and the guide of a reduction, for `pyro_bmr.files.plans.write_plan`.

    The model is run.
    """
    handlers, inner = pack_handlers(model)
    state = pack_state(model, inner, guide.median(), args, kwargs)
    return {"model": state, "handlers": handlers, "guide": pack_guide(guide)}


def unpack_program(packed: Mapping[str, Any], origin: Origin) -> tuple[Any, PrunedGuide]:
    """Make the model and the guide that `pack_program` described.

    The user's model, in ``origin``, takes the parameters and buffers that were saved.
    """
    inner: Any = origin.model
    handlers = packed["handlers"]
    load_state(packed["model"], inner)
    # As `reduce` makes them: the guide's own model is the one inside the outermost masks.
    full = unpack_handlers(handlers[1:], inner)
    model = unpack_handlers(handlers[:1], full)
    return model, unpack_guide(packed["guide"], replace(origin, model=full))


def check_program(
    packed: Mapping[str, Any],
    model: Any,
    guide: PrunedGuide,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Raise a ValueError if a model cannot be run, or has other sites or priors than were saved.

    Without arguments, its sites are checked when it is first called.
    """
    if args or kwargs:
        try:
            recorder, _ = run_recorded(
                model, guide.median(), args, kwargs, "load(path, model, x, y)"
            )
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        recorder.compare(packed["model"]["sites"])
        check_equal("priors", packed["model"]["families"], recorder.families)
    elif isinstance(model, nn.Module):
        check = _FirstCall(packed["model"]["sites"], guide.median().keys())
        model.register_forward_pre_hook(check.start)
        model.register_forward_hook(check.finish, always_call=True)


class _FirstCall:
    """Looks at the sites of a model when it is called for the first time."""

    def __init__(self, sites: Mapping[str, Any], names: Collection[str]) -> None:
        self.sites, self.recorder, self.done = sites, SiteRecorder(set(names)), False

    def start(self, _module: Any, _args: Any) -> None:
        if not self.done:
            self.recorder.__enter__()

    def finish(self, _module: Any, _args: Any, _output: Any) -> None:
        if not self.done:
            self.recorder.__exit__(None, None, None)
            # Called also when the model fails, which it does for reasons of its own.
            self.done = sys.exc_info()[0] is None
            if self.done:
                self.recorder.compare(self.sites)
