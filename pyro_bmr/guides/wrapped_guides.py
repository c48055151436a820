"""Guides inside of handlers and of bound arguments: looked through, left to be run, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.scale_messenger import ScaleMessenger

from pyro_bmr.programs.sites import Site
from pyro_bmr.programs.wrapped import peel

_WEIGHTS = {ScaleMessenger: "scale", MaskMessenger: "mask"}


def find_inner(guide: Any) -> Any:
    """Return the guide inside, if it draws what the whole draws, or else the whole."""
    check_unweighted(guide)
    wrapped = peel(guide)
    return wrapped.program if wrapped.is_transparent else guide


def check_unweighted(guide: Any) -> None:
    """Raise a ValueError if a guide counts in F by more or less than its log density."""
    wrapped = peel(guide)
    for handler in wrapped.handlers:
        name = _WEIGHTS.get(type(handler))
        if name is not None:
            msg = (
                f"cannot reduce a guide inside of poutine.{name}, which changes F: what the "
                "reduced guide draws would count by another weight. Expected the guide without it: "
                f"pass the {_kind(wrapped.program)} inside, and as model= the model without "
                f"poutine.{name}; where the scale of both is the same, so is the optimum"
            )
            raise ValueError(msg)


def check_seen(guide: Any, sites: Iterable[Site]) -> None:
    """Raise a ValueError if a handler around a guide hides some of its sites."""
    wrapped = peel(guide)
    blocks = [h for h in wrapped.handlers if isinstance(h, BlockMessenger)]
    hidden = [site.name for site in sites if any(b.hide_fn(_message(site)) for b in blocks)]
    if hidden:
        kind = _kind(wrapped.program)
        msg = (
            f"cannot reduce a guide inside of poutine.block, which hides the sites {hidden}: the "
            f"model draws them from their prior. Expected every site of the {kind} to be seen: "
            "pass it without poutine.block, or train one for poutine.block(model, hide=[...])"
        )
        raise ValueError(msg)


def _message(site: Site) -> Any:
    """Make what a handler sees of a site that an autoguide draws."""
    value = torch.zeros(site.shape, device="cpu")
    return {
        "type": "sample",
        "name": site.name,
        "fn": dist.Delta(value, event_dim=site.event_dim),
        "is_observed": False,
        "value": value,
        "infer": {},
        "cond_indep_stack": site.plates,
        "scale": 1.0,
        "mask": None,
        "args": (),
        "kwargs": {},
    }


def _kind(guide: Any) -> str:
    return getattr(guide, "__name__", type(guide).__name__)
