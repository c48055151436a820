"""Guide families that are read from their parameters, and those that have no Gaussian to read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, singledispatch
from typing import Any

from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from pyro.infer.autoguide.gaussian import AutoGaussianDense, AutoGaussianFunsor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.auto_gamma import AutoGamma
from pyro_bmr.guides.autoguides import (
    check_called,
    read_parameter,
    read_site,
    read_value,
    read_whole_site,
)
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.guides.statements import NotGaussianError
from pyro_bmr.guides.structured_autoguides import read_gaussian, read_structured
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.programs.sites import Site


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
    pyro_bmr.guides.families.UnregisteredGuideError: cannot reduce a guide of type ...
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
        f"AutoGuideList: {remedy}. Expected a guide, or at least a part of one, that is Gaussian"
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


def is_registered(guide: Any) -> bool:
    """Tell whether the family of a guide is known, if only to be refused."""
    unread = (read_factors.dispatch(kind) for kind in (object, AutoGuideList))
    return read_factors.dispatch(type(guide)) not in unread


def is_refused(guide: Any) -> bool:
    """Tell whether a guide is of a family that has no Gaussian to read."""
    return isinstance(read_factors.dispatch(type(guide)), partial)


def list_refused(parts: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield the sites of parts that are not Gaussian, and why."""
    for part in parts:
        check_called(part)
        for name, _ in part.prototype_trace.iter_stochastic_nodes():
            yield name, next(_LEFT[kind] for kind in type(part).__mro__ if kind in _LEFT)


def _joint_sites(guide: AutoContinuous) -> tuple[Site, ...]:
    check_called(guide)
    sites = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        shape = guide._unconstrained_shapes[name]
        event_dim = node["fn"].event_dim + len(shape) - node["value"].dim()
        sites.append(read_whole_site(guide, node, shape, event_dim))
    return tuple(sites)
