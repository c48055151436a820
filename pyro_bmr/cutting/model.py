"""A model made smaller: its program, and the masks and priors that stand around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro_bmr.cutting.program import CompactedModel, Cut
from pyro_bmr.programs.handlers import PrunedModel, SiteBuffers
from pyro_bmr.programs.sites import take
from pyro_bmr.programs.switching import SwitchedModel
from pyro_bmr.programs.wrappers import find_wrappers

_CUT_WITH_SITES = (PrunedModel, SwitchedModel)


def cut_model(model: Callable[..., Any], cut: Cut) -> Callable[..., Any]:
    """Put the smaller program inside of what stands around the model, cut as its sites are.

    What changes the prior of a site by tensors of its shape has to see the smaller prior.
    """
    wrappers = list(find_wrappers(model, _CUT_WITH_SITES))
    held = {
        id(buffer)
        for wrapper in wrappers
        for part in wrapper.children()
        if isinstance(part, SiteBuffers)
        for buffer in part.buffers()
    }
    program = wrappers[-1].model if wrappers else model
    tensors = tuple((tensor, kept) for tensor, kept in cut.tensors if id(tensor) not in held)
    smaller: Callable[..., Any] = CompactedModel(program, replace(cut, tensors=tensors))
    for wrapper in reversed(wrappers):
        smaller = _cut_wrapper(wrapper, smaller, cut)
    return smaller


def _cut_wrapper(wrapper: Any, smaller: Callable[..., Any], cut: Cut) -> Callable[..., Any]:
    kept = cut.sites
    if isinstance(wrapper, SwitchedModel):
        priors = wrapper.new_priors()
        return SwitchedModel(smaller, {n: new.take(kept.get(n, ())) for n, new in priors.items()})
    masks, centers = wrapper.masks.by_site(), wrapper.centers
    return PrunedModel(
        smaller,
        {n: take(mask, kept.get(n, ())) for n, mask in masks.items()},
        {n: center.map(lambda t, n=n: take(t, kept.get(n, ()))) for n, center in centers.items()},
        wrapper.marginal,
    )
