"""Guide families, read as factors. The one file that knows the inside of Pyro's autoguides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoGuide,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.auto_gamma import AutoGamma
from pyro_bmr.factors import Factor, Site
from pyro_bmr.gamma_factor import GammaFactor
from pyro_bmr.gaussian import Dense, LowRank
from pyro_bmr.independent_factor import IndependentFactor
from pyro_bmr.joint_factor import JointFactor
from pyro_bmr.pruned_guide import Origin, PrunedGuide


def read_guide(guide: Any) -> tuple[Factor, ...]:
    """Read the posterior that a guide holds, without touching the guide.

    Parameters
    ----------
    guide : callable
        A trained guide of a registered family.

    Returns
    -------
    tuple of Factor
        Its independent factors. Tensors are shared with the guide where that is possible.

    Raises
    ------
    UnregisteredGuideError
        If the family of the guide is not registered.
    ValueError
        If the guide was never called, or holds values that are not finite, or is no longer the
        owner of its parameters.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    >>> _ = guide()
    >>> read_guide(guide)[0].site.shape
    torch.Size([3])
    """
    with torch.no_grad():
        factors = read_factors(guide)
    for factor in factors:
        factor.check()
    return factors


class UnregisteredGuideError(TypeError):
    """A guide whose family this package does not know how to read."""


@singledispatch
def read_factors(guide: Any) -> tuple[Factor, ...]:
    """Return the factors of a guide family; register a family of your own here.

    ``@read_factors.register(MyGuide)`` on a function that returns `IndependentFactor` and
    `JointFactor` objects; `pyro_bmr.testing.check_guide_family` checks it.

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
    pyro_bmr.guides.UnregisteredGuideError: cannot reduce a guide of type ...
    """  # noqa: DOC202
    known = ", ".join(sorted(t.__name__ for t in read_factors.registry if t is not object))
    msg = (
        f"cannot reduce a guide of type {type(guide).__name__}. Expected one of {known}, or a "
        "family registered with @pyro_bmr.read_factors.register; a guide without a Gaussian "
        "posterior, such as AutoDelta, has to be trained again as one of these, also where it is "
        "part of an AutoGuideList"
    )
    raise UnregisteredGuideError(msg)


@read_factors.register
def _(guide: AutoNormal) -> tuple[Factor, ...]:
    _check_called(guide)
    factors = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        loc = _parameter(guide, f"locs.{name}")
        scale = _parameter(guide, f"scales.{name}")
        site = _site(node, loc.shape, guide._event_dims[name])
        factors.append(IndependentFactor(site, loc, scale, guide.scale_constraint))
    return tuple(factors)


@read_factors.register
def _(guide: AutoDiagonalNormal) -> tuple[Factor, ...]:
    sites = _joint_sites(guide)
    sizes = [site.shape.numel() for site in sites]
    loc, scale = (_parameter(guide, name).split(sizes) for name in ("loc", "scale"))
    return tuple(
        IndependentFactor(
            site, loc[i].view(site.shape), scale[i].view(site.shape), guide.scale_constraint
        )
        for i, site in enumerate(sites)
    )


@read_factors.register
def _(guide: AutoMultivariateNormal) -> tuple[Factor, ...]:
    sites = _joint_sites(guide)
    scale = transform_to(guide.scale_constraint)(_parameter(guide, "scale"))
    tril = transform_to(guide.scale_tril_constraint)(_parameter(guide, "scale_tril"))
    return (JointFactor(sites, Dense(_parameter(guide, "loc"), scale[:, None] * tril)),)


@read_factors.register
def _(guide: AutoLowRankMultivariateNormal) -> tuple[Factor, ...]:
    sites = _joint_sites(guide)
    scale = transform_to(guide.scale_constraint)(_parameter(guide, "scale"))
    factor = scale[:, None] * _parameter(guide, "cov_factor")
    return (JointFactor(sites, LowRank(_parameter(guide, "loc"), factor, scale.square())),)


@read_factors.register
def _(guide: AutoGamma) -> tuple[Factor, ...]:
    _check_called(guide)
    factors = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        homes = ("concentrations", "means")
        concentration, mean = (_parameter(guide, f"{home}.{name}").exp() for home in homes)
        site = _site(node, mean.shape, node["fn"].event_dim)
        factors.append(GammaFactor(site, concentration, mean))
    return tuple(factors)


@read_factors.register
def _(guide: AutoGuideList) -> tuple[Factor, ...]:
    _check_called(guide)
    return tuple(factor for part in guide for factor in read_factors(part))


@read_factors.register
def _(guide: PrunedGuide) -> tuple[Factor, ...]:
    return tuple(part.factor() for part in guide.parts)


@singledispatch
def read_origin(guide: Any) -> Origin:
    """Return the model that a guide was made for, and how it was first called.

    Parameters
    ----------
    guide : callable
        A guide of any family.

    Returns
    -------
    Origin
        With ``model=None`` where the guide does not know it.

    Examples
    --------
    >>> read_origin(print).model is None
    True
    """
    return Origin(getattr(guide, "model", None))


@read_origin.register
def _(guide: PrunedGuide) -> Origin:
    return guide.origin


@read_origin.register
def _(guide: AutoGuide) -> Origin:
    first_call = guide.prototype_trace.nodes["_INPUT"]
    # copy.deepcopy and torch.save take the model away from an autoguide, also from the live one.
    model = None if guide._model is None else _without_guide_handlers(guide.model)
    return Origin(model, first_call["args"], first_call["kwargs"], guide.create_plates)


def _without_guide_handlers(model: Callable[..., Any]) -> Callable[..., Any]:
    """Peel off what only concerns the guide: initial values, and sites hidden from it.

    Returns
    -------
    callable
        The model as the user wrote it.
    """
    while True:
        wrapper = getattr(model, "func", None)
        if not (isinstance(wrapper, partial) and len(wrapper.args) == 2):
            return model
        handler, inner = wrapper.args
        if not isinstance(handler, InitMessenger | BlockMessenger):
            return model
        model = inner


def _check_called(guide: AutoGuide) -> None:
    if guide.prototype_trace is None:
        msg = (
            f"this {type(guide).__name__} has never been called, so it has no parameters. Expected "
            "a trained guide: train it by SVI, or call guide(*args) once"
        )
        raise ValueError(msg)


def _joint_sites(guide: AutoContinuous) -> tuple[Site, ...]:
    _check_called(guide)
    sites = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        for frame in node["cond_indep_stack"]:
            if frame.full_size not in (None, frame.size):
                msg = (
                    f"{type(guide).__name__} holds {frame.size} rows of the site {name!r}, whose "
                    f"plate {frame.name!r} has {frame.full_size}: it cannot follow a sub-sampling "
                    "plate. Expected a guide that holds all rows, such as AutoNormal"
                )
                raise ValueError(msg)
        shape = guide._unconstrained_shapes[name]
        event_dim = node["fn"].event_dim + len(shape) - node["value"].dim()
        sites.append(_site(node, shape, event_dim))
    return tuple(sites)


def _site(node: Any, shape: torch.Size, event_dim: int) -> Site:
    return Site(
        node["name"], torch.Size(shape), event_dim, node["fn"].support, node["cond_indep_stack"]
    )


def _parameter(guide: AutoGuide, path: str) -> Tensor:
    """Read what a guide optimises, without the param store noticing.

    Returns
    -------
    Tensor
        The unconstrained parameter.

    Raises
    ------
    ValueError
        If the param store holds another tensor under the name of this parameter.
    """
    parameters: dict[str, Tensor] = dict(guide.named_parameters())
    own = parameters[path if path in parameters else f"{path}_unconstrained"]
    name = f"{guide._pyro_name}.{path}"
    entries: dict[str, Tensor] = dict(pyro.get_param_store().named_parameters())
    stored = entries.get(name, own)
    local = pyro.settings.get("module_local_params")
    if not (local or stored is own or torch.equal(stored, own)):
        msg = (
            f"the guide's parameter {name!r} differs from the entry of that name in Pyro's param "
            "store: another guide of that name was trained, or a store was loaded. Expected them "
            "to agree: call the guide once to take the values of the store, or "
            "pyro.clear_param_store() to keep those of the guide"
        )
        raise ValueError(msg)
    return own.detach()
