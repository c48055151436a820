"""A model and its guide as plain data, and back around the user's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.storage.guides import pack_guide, unpack_guide
from pyro_bmr.storage.models import (
    check_sites,
    load_state,
    pack_handlers,
    pack_state,
    unpack_handlers,
)


def pack_program(
    model: Callable[..., Any],
    guide: PrunedGuide,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Describe the model and the guide of a reduction.

    Parameters
    ----------
    model, guide : callable
        Of a reduction.
    args, kwargs : optional
        Arguments to run the model with; those of the guide's first call otherwise.

    Returns
    -------
    dict
        For `pyro_bmr.storage.plans.write_plan`.

    Examples
    --------
    >>> list(pack_program(print, PrunedGuide((), Origin(print)), None, None))
    <BLANKLINE>
    ['model', 'handlers', 'guide']
    """
    handlers, inner = pack_handlers(model)
    if args is None and kwargs is None:
        args, kwargs = guide.origin.args, guide.origin.kwargs
    state = pack_state(inner, guide.median(), tuple(args or ()), dict(kwargs or {}))
    return {"model": state, "handlers": handlers, "guide": pack_guide(guide)}


def unpack_program(packed: Mapping[str, Any], origin: Origin) -> tuple[Any, PrunedGuide]:
    """Make the model and the guide that `pack_program` described.

    Parameters
    ----------
    packed : mapping
        What it returned.
    origin : Origin
        The user's model, which takes the parameters and buffers that were saved, and how to call
        it. Without arguments, its sites are checked when it is called.

    Returns
    -------
    model : callable
        Of the reduction.
    guide : PrunedGuide
        Of the reduction.

    Examples
    --------
    >>> packed = pack_program(print, PrunedGuide((), Origin(print)), None, None)
    <BLANKLINE>
    >>> unpack_program(packed, Origin(print))[0] is print
    True
    """
    inner: Any = origin.model
    # As `reduce` makes them: the guide's own model is the one inside the outermost masks.
    full = unpack_handlers(packed["handlers"][1:], inner)
    model = unpack_handlers(packed["handlers"][:1], full)
    guide = unpack_guide(packed["guide"], replace(origin, model=full))
    check = _FirstCall(packed["model"]["sites"], inner, guide)
    if origin.args or origin.kwargs:
        check(model, origin.args, dict(origin.kwargs))
    load_state(packed["model"], inner)
    if isinstance(model, nn.Module):
        model.register_forward_pre_hook(check, with_kwargs=True)
    return model, guide


@dataclass
class _FirstCall:
    """Looks at the sites of a model when it is called for the first time."""

    sites: Mapping[str, Any]
    model: Callable[..., Any]
    guide: PrunedGuide
    checked: bool = False

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.checked:
            check_sites(self.sites, self.model, self.guide.median(), args, kwargs)
            self.checked = True
