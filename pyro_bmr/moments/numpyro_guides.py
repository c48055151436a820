"""Autoguides of NumPyro: their parameters, and the Normal priors of their model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_bmr.arguments.checks import check_kind, read_names, refuse, refuse_kind
from pyro_bmr.arguments.patterns import find_names
from pyro_bmr.display import warn

# Distributions that only shape another one.
_SHAPED = ("Independent", "ExpandedDistribution")


def read_numpyro(guide: Any, params: Any, sites: Any, prior: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a posterior: of the sites on the real line that have a prior."""
    from scipy.linalg import block_diag

    if not (hasattr(guide, "prototype_trace") and hasattr(guide, "prefix")):
        refuse_kind("guide", guide, "an autoguide of NumPyro")
    trace = guide.prototype_trace
    if trace is None:
        msg = "this guide was never called. Expected one that SVI has trained"
        raise ValueError(msg)
    check_kind("params", params, Mapping, "parameters by name, of svi_result.params")
    means, covariance = _posterior(guide, params)
    given = bool(prior)
    latent = {name: trace[name]["fn"] for name in means}
    reasons = {name: _reason(fn, given) for name, fn in latent.items()}
    if not given:
        why = "its prior depends on other sites, or may"
        reasons |= dict.fromkeys(_dependent(guide, latent), why)
    names = _choose(read_names("sites", sites), reasons)
    shapes = {name: means[name].shape for name in means}
    where = np.concatenate([_positions(shapes, name) for name in names])
    arguments: dict[str, Any] = {"mean": {name: means[name] for name in names}}
    arguments["covariance"] = covariance[np.ix_(where, where)]
    if given:
        return arguments | prior
    before = {name: _moments(latent[name], shapes[name]) for name in names}
    arguments["prior_mean"] = {name: mean for name, (mean, _) in before.items()}
    arguments["prior_covariance"] = block_diag(*(block for _, block in before.values()))
    return arguments


def _posterior(guide: Any, params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read means by site and the covariance of all, in unconstrained coordinates."""
    prefix = guide.prefix
    sites = [name for name in guide.prototype_trace if f"{name}_{prefix}_loc" in params]
    if sites:
        means = {site: _float(params[f"{site}_{prefix}_loc"]) for site in sites}
        scales = [_parameter(params, f"{site}_{prefix}_scale").reshape(-1) for site in sites]
        return means, np.diag(np.concatenate(scales) ** 2)
    loc = _parameter(params, f"{prefix}_loc")
    if not hasattr(guide, "_unpack_latent"):
        refuse("guide", type(guide).__name__, "an autoguide with a Gaussian posterior")
    # Where each element of each site is in the vector.
    places = {k: np.asarray(v) for k, v in guide._unpack_latent(np.arange(len(loc))).items()}
    order = np.concatenate([place.reshape(-1) for place in places.values()])
    covariance = _joint_covariance(guide, params, prefix)
    means = {name: loc[place] for name, place in places.items()}
    return means, covariance[np.ix_(order, order)]


def _joint_covariance(guide: Any, params: Mapping[str, Any], prefix: str) -> np.ndarray:
    """Read the covariance of all elements: :math:`LL^T`, :math:`S(I + WW^T)S` or diagonal."""
    if f"{prefix}_scale_tril" in params:
        tril = _float(params[f"{prefix}_scale_tril"])
    elif f"{prefix}_cov_factor" in params:
        scale = _parameter(params, f"{prefix}_scale")
        factor = _float(params[f"{prefix}_cov_factor"]) * scale[:, None]
        return factor @ factor.T + np.diag(scale**2)
    elif f"{prefix}_scale" in params:
        return np.diag(_float(params[f"{prefix}_scale"]) ** 2)
    elif hasattr(guide, "_loss_fn"):
        tril = _float(guide.get_posterior(params).scale_tril)
        if not tril.any():
            msg = (
                "the Hessian at the mode is singular, and NumPyro gives no covariance. Expected a "
                "posterior with a maximum; x64 precision may help"
            )
            raise ValueError(msg)
    else:
        refuse("guide", type(guide).__name__, "an autoguide with a Gaussian posterior")
    if tril.ndim != 2:
        refuse("guide", type(guide).__name__, "an autoguide with one covariance of all elements")
    return tril @ tril.T


def _choose(wanted: tuple[str, ...] | None, reasons: Mapping[str, str]) -> list[str]:
    if wanted is not None:
        if not wanted:
            refuse("sites", wanted, f"some of {sorted(reasons)}")
        chosen: dict[str, None] = {}
        for name in wanted:
            found = find_names(name, reasons)
            if not found:
                refuse("sites", name, f"some of {sorted(reasons)}")
            readable = [one for one in found if not reasons[one]]
            if not readable:
                why = reasons[found[0]]
                refuse("sites", name, f"sites that a Gaussian prior fits, but {why}")
            chosen |= dict.fromkeys(readable)
        return list(chosen)
    left = {name: reason for name, reason in reasons.items() if reason}
    if len(left) == len(reasons):
        msg = f"no site can be read, {left}. Expected Normal priors, or that prior_scale= is given"
        raise ValueError(msg)
    if left:
        warn(f"left out are {', '.join(f'{name} ({reason})' for name, reason in left.items())}")
    return [name for name, reason in reasons.items() if not reason]


def _reason(fn: Any, given: bool) -> str:
    """Say why a site cannot be read, with its own prior or one that is given."""
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if "real" not in type(support).__name__.lower():
        return f"its support is {support}"
    kind = type(_core(fn)).__name__
    if not given and kind not in ("Normal", "MultivariateNormal"):
        return f"its prior is {kind}"
    return ""


def _core(fn: Any) -> Any:
    while type(fn).__name__ in _SHAPED:
        fn = fn.base_dist
    return fn


def _dependent(guide: Any, latent: Mapping[str, Any]) -> list[str]:
    """Find sites whose prior is another one where other sites have other values."""
    normal = [name for name, fn in latent.items() if not _reason(fn, given=False)]
    call: Any = getattr(getattr(guide, "_potential_fn", None), "args", ())[1:]
    if not normal or len(call) != 2:
        return normal
    from numpyro import handlers

    moments = []
    for seed in range(4):
        model = handlers.seed(guide.model, rng_seed=seed)
        trace = handlers.trace(model).get_trace(*call[0], **call[1])
        priors = {name: trace[name]["fn"] for name in normal}
        moments.append({name: _moments(fn, fn.shape()) for name, fn in priors.items()})
    first, *others = moments
    return [
        name
        for name in normal
        if not all(
            np.array_equal(one, two)
            for other in others
            for one, two in zip(first[name], other[name], strict=True)
        )
    ]


def _moments(fn: Any, shape: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read the mean and the covariance of a Normal prior."""
    from scipy.linalg import block_diag

    mean: Any = np.broadcast_to(_float(fn.mean), shape)
    core = _core(fn)
    if type(core).__name__ == "Normal":
        return mean, np.diag(np.broadcast_to(_float(fn.variance), shape).reshape(-1))
    size = mean.shape[-1]
    blocks = np.broadcast_to(_float(core.covariance_matrix), (*shape, size))
    return mean, block_diag(*blocks.reshape(-1, size, size))


def _positions(shapes: Mapping[str, tuple[int, ...]], name: str) -> np.ndarray:
    sizes = {one: int(np.prod(shape)) for one, shape in shapes.items()}
    names = list(sizes)
    start = sum(sizes[one] for one in names[: names.index(name)])
    return np.arange(start, start + sizes[name])


def _parameter(params: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in params:
        refuse("params", sorted(params)[:5], f"the parameters of this guide, among them {name!r}")
    return _float(params[name])


def _float(value: Any) -> np.ndarray:
    return np.asarray(value, dtype=np.float64)
