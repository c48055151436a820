"""Any guide, read as factors.

A guide whose family is registered with `read_factors` is read from its parameters; any other is run
a few times (`pyro_bmr.guides.traced_guides`). Posterior samples are matched in their moments
(`pyro_bmr.guides.posterior_samples`). A list of guides is read part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, singledispatch
from typing import Any

import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide, AutoNormalMessenger
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import check_factors
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.autoguides import check_called, read_parameter, read_value
from pyro_bmr.guides.families import is_refused, is_registered, list_refused, read_factors
from pyro_bmr.guides.named_moments import name_moments
from pyro_bmr.guides.parts import find_parts
from pyro_bmr.guides.posterior_samples import match_moments
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.guides.traced_guides import draw_alone, trace_factors
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.wrapped import peel


def read_guide(guide: Any, origin: Origin | None = None) -> tuple[Factor, ...]:
    """Read the posterior that a guide, MCMC or samples hold, sharing tensors where possible.

    What cannot be read is an `UnregisteredGuideError` or a `NotGaussianError`; a guide that was
    never called, holds values that are not finite or lost its parameters is a ValueError.
    """
    with torch.no_grad():
        factors = _read(guide, read_origin(guide) if origin is None else origin)
    check_factors(factors)
    return factors


@singledispatch
def _read(guide: Any, origin: Origin) -> tuple[Factor, ...]:
    """Read a guide of a registered family, and any other by running it."""
    parts = [part for part, _ in find_parts(guide)]
    refused = [part for part in parts if is_refused(part)]
    if len(refused) == len(parts):
        return read_factors(parts[0])
    registered = [part for part in parts if is_registered(part) and part not in refused]
    others = [part for part in parts if not is_registered(part)]
    factors = [factor for part in registered for factor in read_factors(part)]
    # What is run may have been trained since it was drawn.
    factors = [factor for factor in factors if not isinstance(factor, ProgramFactor)]
    reasons = dict(list_refused(refused))
    factors += draw_alone(guide, origin, reasons)
    for part in others:
        if not callable(part):
            return read_factors(part)
        if isinstance(part, AutoGuide):
            check_called(part)
    if not (others or any(isinstance(part, PrunedGuide) and part.program for part in parts)):
        if refused and all(isinstance(factor, ProgramFactor) for factor in factors):
            return read_factors(refused[0])
        return tuple(factors)
    held = {site.name for factor in factors for site in factor.sites} | reasons.keys()
    traced = trace_factors(guide, origin, held=held, full_rows=_full_rows(others))
    return (*factors, *traced) or read_factors(guide)


@_read.register(MCMC)
def _(guide: MCMC, origin: Origin) -> tuple[Factor, ...]:
    if guide._samples is None:
        msg = "this MCMC has no samples yet. Expected a finished one: call mcmc.run(*args)"
        raise ValueError(msg)
    return match_moments(guide.get_samples(group_by_chain=True), origin)


@_read.register(Posterior)
def _(guide: Posterior, origin: Origin) -> tuple[Factor, ...]:
    return name_moments(guide, origin)


@_read.register(Mapping)
def _(guide: Mapping[str, Any], origin: Origin) -> tuple[Factor, ...]:
    return match_moments(guide, origin)


def _full_rows(guides: list[Any]) -> Callable[[str], tuple[Tensor, Tensor] | None]:
    """Find location and scale by site: messengers hold all rows of a plate and draw some."""
    stock = AutoNormalMessenger.get_posterior
    messengers = [g for g in guides if getattr(type(g), "get_posterior", None) is stock]

    def full_rows(name: str) -> tuple[Tensor, Tensor] | None:
        for guide in messengers:
            if f"locs.{name}_unconstrained" in dict(guide.named_parameters()):
                scale = read_value(guide, f"scales.{name}", constraints.positive)
                return read_parameter(guide, f"locs.{name}"), scale
        return None

    return full_rows


@singledispatch
def read_origin(guide: Any) -> Origin:
    """Return the model that a guide was made for, if it knows it, and how it was first called."""
    return Origin(_without_guide_handlers(getattr(guide, "model", None)))


@read_origin.register
def _(guide: PrunedGuide) -> Origin:
    return guide.origin


@read_origin.register(MCMC)
def _(guide: MCMC) -> Origin:
    return Origin(getattr(guide.kernel, "model", None), guide._args or (), guide._kwargs or {})


@read_origin.register(partial)
def _(guide: partial[Any]) -> Origin:
    wrapped = peel(guide)
    return read_origin(wrapped.program).bind(wrapped.args, wrapped.kwargs)


@read_origin.register
def _(guide: AutoGuide) -> Origin:
    # AutoStructured and AutoGaussian forget how they were called.
    prototype = guide.prototype_trace
    first_call = {} if prototype is None else prototype.nodes["_INPUT"]
    args, kwargs = first_call.get("args", ()), first_call.get("kwargs", {})
    # copy.deepcopy and torch.save take the model away from an autoguide, also from the live one.
    model = None if guide._model is None else _without_guide_handlers(guide.model)
    return Origin(model, args, kwargs, guide.create_plates)


def _without_guide_handlers(model: Any) -> Any:
    """Peel off what only concerns the guide: initial values, and sites hidden from it."""
    while True:
        wrapper = getattr(model, "func", None)
        if not (isinstance(wrapper, partial) and len(wrapper.args) == 2):
            return model
        handler, inner = wrapper.args
        if not isinstance(handler, InitMessenger | BlockMessenger):
            return model
        model = inner
