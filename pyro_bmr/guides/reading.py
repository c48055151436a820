"""Guide families, read as factors.

A guide whose family is registered with `read_factors` is read from its parameters; any other is run
a few times (`pyro_bmr.guides.traced_guides`). Posterior samples are matched in their moments
(`pyro_bmr.guides.posterior_samples`). A list of guides is read part by part.

With `autoguides` and `structured_autoguides` the only file that knows Pyro's autoguides inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial, singledispatch
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.autoguide import (
    AutoCallable,
    AutoContinuous,
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.gaussian import AutoGaussianDense, AutoGaussianFunsor
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.auto_gamma import AutoGamma
from pyro_bmr.guides.autoguides import (
    check_called,
    read_parameter,
    read_site,
    read_value,
    read_whole_site,
)
from pyro_bmr.guides.guide_program import GuideProgram
from pyro_bmr.guides.guide_reader import left_alone, read_sources
from pyro_bmr.guides.posterior_samples import match_moments
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.guides.statements import NotGaussianError
from pyro_bmr.guides.structured_autoguides import read_gaussian, read_structured
from pyro_bmr.guides.traced_guides import draw_alone, trace_factors
from pyro_bmr.guides.wrapped_guides import check_seen, find_inner
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.sites import Site
from pyro_bmr.programs.wrapped import peel


def read_guide(guide: Any, origin: Origin | None = None) -> tuple[Factor, ...]:
    """Read the posterior that a guide, MCMC or samples hold, sharing tensors where possible.

    What cannot be read is an `UnregisteredGuideError` or a `NotGaussianError`; a guide that was
    never called, holds values that are not finite or lost its parameters is a ValueError.
    """  # noqa: DOC201
    with torch.no_grad():
        factors = _read(guide, read_origin(guide) if origin is None else origin)
    for factor in factors:
        factor.check()
    return factors


class UnregisteredGuideError(TypeError):
    """A guide whose family this package does not know how to read."""


@singledispatch
def read_factors(guide: Any) -> tuple[Factor, ...]:
    """Return the factors of a guide family; register a family of your own here.

    ``@read_factors.register(MyGuide)`` on a function that returns `IndependentFactor` and
    `JointFactor` objects; `pyro_bmr.testing.check_guide_family` checks it. A family that is not
    registered is read by running the guide.

    Parameters
    ----------
    guide : callable
        A guide.

    Returns
    -------
    tuple of Factor
        Its independent factors.

    Raises
    ------
    UnregisteredGuideError
        If the type of the guide is not registered.

    Examples
    --------
    >>> read_factors(print)
    Traceback (most recent call last):
        ...
    pyro_bmr.guides.reading.UnregisteredGuideError: cannot reduce a guide of type ...
    """  # noqa: DOC202
    known = ", ".join(sorted(t.__name__ for t in read_factors.registry if t not in _NO_FAMILY))
    msg = (
        f"cannot reduce a guide of type {type(guide).__name__}. Expected one of {known}; a family "
        "registered with @pyro_bmr.extend.read_factors.register; an AutoGuideList of these; any "
        "other guide that draws from Gaussians when it is called; a finished pyro.infer.MCMC; or a "
        "mapping of site names to posterior samples"
    )
    raise UnregisteredGuideError(msg)


@read_factors.register
def _(guide: AutoNormal) -> tuple[Factor, ...]:
    check_called(guide)
    factors = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        loc = read_parameter(guide, f"locs.{name}")
        scale = read_parameter(guide, f"scales.{name}")
        site = read_site(node, loc.shape, guide._event_dims[name])
        factors.append(IndependentFactor(site, loc, scale, guide.scale_constraint))
    return tuple(factors)


@read_factors.register
def _(guide: AutoDiagonalNormal) -> tuple[Factor, ...]:
    sites = _joint_sites(guide)
    sizes = [site.shape.numel() for site in sites]
    loc, scale = (read_parameter(guide, name).split(sizes) for name in ("loc", "scale"))
    return tuple(
        IndependentFactor(
            site, loc[i].view(site.shape), scale[i].view(site.shape), guide.scale_constraint
        )
        for i, site in enumerate(sites)
    )


@read_factors.register
def _(guide: AutoMultivariateNormal) -> tuple[Factor, ...]:
    # The guide that AutoLaplaceApproximation.laplace_approximation returns is one, too.
    sites = _joint_sites(guide)
    loc = read_value(guide, "loc", constraints.real)
    scale = read_value(guide, "scale", guide.scale_constraint)
    tril = read_value(guide, "scale_tril", guide.scale_tril_constraint)
    return (JointFactor(sites, Dense(loc, scale[:, None] * tril)),)


@read_factors.register
def _(guide: AutoLowRankMultivariateNormal) -> tuple[Factor, ...]:
    sites = _joint_sites(guide)
    scale = read_value(guide, "scale", guide.scale_constraint)
    factor = scale[:, None] * read_parameter(guide, "cov_factor")
    return (JointFactor(sites, LowRank(read_parameter(guide, "loc"), factor, scale.square())),)


@read_factors.register
def _(guide: AutoGamma) -> tuple[Factor, ...]:
    check_called(guide)
    factors = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        homes = ("concentrations", "means")
        concentration, mean = (read_parameter(guide, f"{home}.{name}").exp() for home in homes)
        site = read_site(node, mean.shape, node["fn"].event_dim)
        factors.append(GammaFactor(site, concentration, mean))
    return tuple(factors)


read_factors.register(AutoStructured, read_structured)
read_factors.register(AutoGaussianDense, read_gaussian)


@read_factors.register
def _(guide: PrunedGuide) -> tuple[Factor, ...]:
    return tuple(part.factor() for part in guide.parts)


@read_factors.register
def _(guide: AutoGuideList) -> tuple[Factor, ...]:
    check_called(guide)
    return tuple(factor for part in guide for factor in read_factors(part))


_TRAIN_AGAIN = "Train AutoNormal, AutoMultivariateNormal or another Gaussian guide"
_REMEDIES = {
    AutoDelta: "it is a point estimate, whose posterior has no variance to weigh against the "
    "prior. Train AutoNormal instead, or take the Laplace approximation: train "
    "AutoLaplaceApproximation and reduce what its laplace_approximation(*args) returns",
    AutoLaplaceApproximation: "before laplace_approximation(*args) is called it is a point "
    "estimate. Call it, and reduce the guide that it returns",
    AutoNormalizingFlow: f"the posterior of a flow is not Gaussian. {_TRAIN_AGAIN} instead",
    AutoDiscreteParallel: "its sites are discrete, and have no density at zero. Hide them from the "
    "guide (poutine.block) and sum them out (config_enumerate, TraceEnum_ELBO) instead",
    AutoGaussianFunsor: "its covariance is never formed. Its parameters are those of "
    'AutoGaussian(model, backend="dense"): make that guide, call it once, load_state_dict(...) '
    "from this one, and reduce it",
}


def _refuse(guide: Any, remedy: str) -> tuple[Factor, ...]:
    msg = (
        f"cannot reduce a guide of type {type(guide).__name__}, also as a part of an "
        f"AutoGuideList: {remedy}"
    )
    raise NotGaussianError(msg)


for _family, _remedy in _REMEDIES.items():
    read_factors.register(_family, partial(_refuse, remedy=_remedy))

_LEFT = {
    AutoDelta: "left to the guide: it is a point estimate",
    AutoLaplaceApproximation: "left to the guide: it is a point estimate",
    AutoNormalizingFlow: "left to the guide: it is a normalizing flow",
    AutoDiscreteParallel: "it is discrete",
    AutoGaussianFunsor: "left to the guide: its covariance is never formed",
}

_NO_FAMILY = {object, AutoGuideList, *_REMEDIES}


@singledispatch
def _read(guide: Any, origin: Origin) -> tuple[Factor, ...]:
    """Read a guide of a registered family, and any other by running it."""
    parts = list(_parts(guide))
    refused = [part for part in parts if _is_refused(part)]
    if len(refused) == len(parts):
        return read_factors(parts[0])
    registered = [part for part in parts if _is_registered(part) and part not in refused]
    others = [part for part in parts if not _is_registered(part)]
    factors = [factor for part in registered for factor in read_factors(part)]
    reasons = dict(_list_refused(refused))
    factors += draw_alone(guide, origin, reasons)
    if not others:
        return tuple(factors)
    for part in others:
        if not callable(part):
            return read_factors(part)
        if isinstance(part, AutoGuide):
            check_called(part)
    held = {site.name for factor in factors for site in factor.sites} | reasons.keys()
    traced = trace_factors(guide, origin, held=held, full_rows=_full_rows(others))
    return (*factors, *traced) or read_factors(guide)


@_read.register
def _(guide: PrunedGuide, origin: Origin) -> tuple[Factor, ...]:
    factors = [f for f in read_factors(guide) if not isinstance(f, ProgramFactor)]
    if len(factors) == len(guide.parts):
        return tuple(factors)
    held = {site.name for factor in factors for site in factor.sites}
    return (*factors, *trace_factors(guide, origin, held=held))


def _list_refused(parts: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield the sites of parts that are not Gaussian, and why."""
    for part in parts:
        check_called(part)
        for name, _ in part.prototype_trace.iter_stochastic_nodes():
            yield name, next(_LEFT[kind] for kind in type(part).__mro__ if kind in _LEFT)


def find_program(guide: Any, origin: Origin, factors: Iterable[Factor]) -> GuideProgram | None:
    """Find what has to be run, if some of the sites of a guide are not read: all but autoguides."""
    if isinstance(guide, PrunedGuide):
        return origin.program
    program = take_program(guide, ())
    if not program.guides:
        return None
    with dry_run(guide, origin.model), left_alone(guide, origin.model), poutine.block():
        drawn = program.run({}, {}, origin.args, origin.kwargs)
        sources = read_sources(guide, origin)
    factors = (factor for factor in factors if not isinstance(factor, ProgramFactor))
    read = {site.name for factor in factors for site in factor.sites}
    hidden = frozenset(source for source, name in sources.items() if name in read)
    left = frozenset(drawn.keys() - read)
    return replace(program, sites=left, hidden=hidden) if left else None


def take_program(guide: Any, sites: Iterable[str]) -> GuideProgram:
    """Take all of a guide that is no autoguide which is read, for some sites."""
    parts = (p for p in _parts(guide) if callable(p) and (_is_refused(p) or not _is_registered(p)))
    whole = guide if isinstance(guide, AutoGuideList) else None
    return GuideProgram(tuple(parts), frozenset(sites), whole)


@_read.register(MCMC)
def _(guide: MCMC, origin: Origin) -> tuple[Factor, ...]:
    if guide._samples is None:
        msg = "this MCMC has no samples yet. Expected a finished one: call mcmc.run(*args)"
        raise ValueError(msg)
    return match_moments(guide.get_samples(group_by_chain=True), origin, chains=True)


@_read.register(Mapping)
def _(guide: Mapping[str, Tensor], origin: Origin) -> tuple[Factor, ...]:
    return match_moments(guide, origin, chains=False)


def _parts(guide: Any) -> Iterator[Any]:
    if isinstance(guide, AutoGuideList) and not _is_registered(guide):
        check_called(guide)
        for part in guide:
            yield from _parts(part)
    elif isinstance(guide, AutoCallable) and not _is_registered(guide):
        yield from _parts(guide._guide)
    elif (inner := find_inner(guide)) is not guide:
        for part in _parts(inner):
            if _is_registered(part):
                check_seen(guide, (site for factor in read_factors(part) for site in factor.sites))
            # What is run is run with what is bound to it.
            yield guide if part is inner and not _is_registered(part) else part
    else:
        yield guide


def _is_registered(guide: Any) -> bool:
    unread = (read_factors.dispatch(kind) for kind in (object, AutoGuideList))
    return read_factors.dispatch(type(guide)) not in unread


def _is_refused(guide: Any) -> bool:
    return isinstance(read_factors.dispatch(type(guide)), partial)


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


def _joint_sites(guide: AutoContinuous) -> tuple[Site, ...]:
    check_called(guide)
    sites = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        shape = guide._unconstrained_shapes[name]
        event_dim = node["fn"].event_dim + len(shape) - node["value"].dim()
        sites.append(read_whole_site(guide, node, shape, event_dim))
    return tuple(sites)
