"""What the prior of a sample site is, read from the model itself.

`read_priors` is the entry; `log_density_at_zero` is where a prior family is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import singledispatch
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Cauchy, Independent, Laplace, Normal, StudentT, constraints

from pyro_bmr.distributions import PrunedDistribution, find_core
from pyro_bmr.dry_run import dry_run
from pyro_bmr.factors import Prior, Site
from pyro_bmr.gaussian import Diagonal


def read_priors(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    locations: Mapping[str, tuple[Site, Tensor]],
) -> tuple[dict[str, Prior], dict[str, str]]:
    """Run the model once at the posterior's location and read the prior of every latent site.

    The run leaves no trace: parameters that it would add to the param store, buffers that it would
    update and random numbers that it would draw are all put back. What a prior depends on is found
    through tensors; a model that turns a sampled value into a Python number, or branches on it, and
    makes a prior of that, hides it.

    Parameters
    ----------
    model : callable
        A Pyro model.
    args, kwargs
        What it is called with.
    locations : mapping
        By name, the sites of the guide and their location in unconstrained coordinates.

    Returns
    -------
    priors : dict of Prior
        By site that may be reduced.
    reasons : dict of str
        Why each remaining latent site stays whole.

    Raises
    ------
    RuntimeError
        If the model cannot be run with these arguments.
    ValueError
        If a site of the guide is no longer in the model, or has another shape.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> model = lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    >>> priors, _ = read_priors(model, (), {}, {"w": (Site("w", torch.Size([3])), torch.zeros(3))})
    >>> priors["w"].log_density_at_zero
    tensor([-0.9189], dtype=torch.float64)
    """
    nodes = _trace(model, args, kwargs, locations)
    latent = {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not site_is_subsample(node)
        and not node["infer"].get("_deterministic", False)
    }
    priors: dict[str, Prior] = {}
    reasons = {name: _absence(node) for name, node in latent.items() if name not in locations}
    for name, (site, _) in locations.items():
        if name not in latent:
            fate = "observed" if name in nodes else "not in the model"
            msg = (
                f"the guide holds the site {name!r}, which is now {fate}. Expected the model that "
                f"the guide was trained for, which has the latent sites {sorted(latent)}. Pass "
                "that model, or the args= and kwargs= under which it has this site"
            )
            raise ValueError(msg)
        node = latent[name]
        reason = _obstacle(node, latent)
        if reason is None:
            _check_shape(node, site)
            try:
                priors[name] = _read_prior(node)
                continue
            except (UnregisteredPriorError, _VaryingPriorError) as error:
                reason = str(error)
        reasons[name] = reason
    return priors, reasons


class UnregisteredPriorError(TypeError):
    """A prior whose density at zero this package does not know how to read."""


@singledispatch
def log_density_at_zero(prior: Any) -> Tensor:
    """Return ln p(θ = 0) of each element of a prior whose elements are independent.

    Register a family of your own with ``@log_density_at_zero.register``; it must be finite at 0.

    Parameters
    ----------
    prior : Distribution
        A distribution over the real line, in any wrapping.

    Returns
    -------
    Tensor
        In nats and float64; broadcasts to ``prior.shape()``.

    Raises
    ------
    UnregisteredPriorError
        If the type of the prior is not registered.

    Examples
    --------
    >>> log_density_at_zero(Laplace(0.0, 1.0))
    tensor(-0.6931, dtype=torch.float64)
    """  # noqa: DOC202
    msg = (
        f"its prior is a {type(prior).__name__}, whose density at zero is not registered "
        "(pyro_bmr.log_density_at_zero.register adds a family)"
    )
    raise UnregisteredPriorError(msg)


@log_density_at_zero.register(Normal)
@log_density_at_zero.register(Laplace)
@log_density_at_zero.register(StudentT)
@log_density_at_zero.register(Cauchy)
def _(prior: Any) -> Tensor:
    # A prior is mostly one scalar, expanded to a whole layer: undo that before computing.
    parameters = {name: _collapse(getattr(prior, name)).double() for name in prior.arg_constraints}
    zero = torch.zeros((), dtype=torch.float64, device=parameters["loc"].device)
    try:
        collapsed = type(prior)(**parameters, validate_args=False)
    except TypeError:  # a subclass that is made in another way
        return prior.log_prob(zero)
    return collapsed.log_prob(zero)


@log_density_at_zero.register(Independent)
@log_density_at_zero.register(ExpandedDistribution)
def _(prior: Any) -> Tensor:
    return log_density_at_zero(prior.base_dist)


@log_density_at_zero.register
def _(prior: PrunedDistribution) -> Tensor:  # noqa: ARG001
    msg = (
        "it is a site of a pruned model, whose own guide is the one to reduce: reduce(result.guide)"
    )
    raise UnregisteredPriorError(msg)


@log_density_at_zero.register(MaskedDistribution)
def _(prior: Any) -> Tensor:
    return _masked(log_density_at_zero(prior.base_dist), prior._mask, prior.event_dim)


_POSITIVE = (constraints.positive, constraints.nonnegative)


class _VaryingPriorError(ValueError):
    """A prior that differs between the rows of a plate of which only some were seen."""


class _Substitute(Messenger):
    """Give latent sites a value, of which a sub-sampling plate takes its rows."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            value = self.values[msg["name"]]
            msg["value"] = pyro.subsample(value, event_dim=msg["fn"].event_dim)
            msg["done"] = True


def _trace(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    locations: Mapping[str, tuple[Site, Tensor]],
) -> dict[str, Any]:
    # Gradients and provenance both tell what a prior depends on: gradients also through values
    # that were written in place, provenance also through discrete ones.
    values = {name: loc.detach().requires_grad_() for name, (_, loc) in locations.items()}
    try:
        return _run(model, args, kwargs, locations, values)
    except Exception:
        # The model may write to its samples, which the guide's own tensors do not allow.
        copies = {name: value.clone() for name, value in values.items()}
    try:
        return _run(model, args, kwargs, locations, copies)
    except Exception as error:
        msg = (
            f"the model could not be run to read its priors ({type(error).__name__}: {error}). "
            "Expected it to run with the arguments of the guide's first call, or with those given; "
            "pass args= and kwargs= with which it runs, on the device of the guide"
        )
        raise RuntimeError(msg) from error


def _run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    locations: Mapping[str, tuple[Site, Tensor]],
    values: Mapping[str, Tensor],
) -> dict[str, Any]:
    with dry_run(model), TrackProvenance():
        values = {name: locations[name][0].constrain(value) for name, value in values.items()}
        with _Substitute(values):
            return dict(poutine.trace(model).get_trace(*args, **kwargs).nodes)


def _absence(node: Any) -> str:
    if getattr(node["fn"].support, "is_discrete", False):
        return "it is discrete"
    return "the guide does not hold it"


def _obstacle(node: Any, latent: Iterable[str]) -> str | None:
    """Say why a site cannot be reduced whatever its prior family, if so."""
    fn = node["fn"]
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support.is_discrete:
        return "it is discrete"
    if support is not constraints.real and support is not constraints.real_vector:
        return "it is positive" if support in _POSITIVE else f"it is constrained to {support}"
    parameters = [*_parameters(fn), node["mask"], node["scale"]]
    origins = frozenset().union(*(get_provenance(p) for p in parameters))
    parents = sorted(origins & set(latent))
    if parents:
        return f"its prior depends on {', '.join(map(repr, parents))}"
    if any(isinstance(p, Tensor) and p.requires_grad for p in parameters):
        return "its prior depends on other sites or on learnable parameters"
    plates = 1.0
    for frame in node["cond_indep_stack"]:
        plates *= (frame.full_size or frame.size) / frame.size
    if not torch.allclose(torch.as_tensor(node["scale"]).float(), torch.tensor(plates)):
        return "its log density is scaled (poutine.scale), so that its prior is tempered"
    if node["mask"] is False:
        return "it is masked out"
    return None


def _parameters(fn: Any) -> Iterator[Tensor]:
    while fn is not None:
        yield from (value for value in vars(fn).values() if isinstance(value, Tensor))
        fn = vars(fn).get("base_dist")


def _read_prior(node: Any) -> Prior:
    fn = node["fn"]
    density = detach_provenance(log_density_at_zero(fn)).detach()
    density = _masked(density, node["mask"], fn.event_dim)
    if density.isnan().any() or (density == -torch.inf).any():
        msg = "its prior density at zero is 0 or not a number"
        raise _VaryingPriorError(msg)
    if density.numel() and density.isinf().all():
        msg = "it is masked out, or its prior density at zero is infinite"
        raise _VaryingPriorError(msg)
    core = find_core(fn)
    if not isinstance(core, Normal):
        return Prior(_at_full_size(node, density))
    loc, scale = (_collapse(t).detach().double() for t in (core.loc, core.scale))
    gaussian = Diagonal(_at_full_size(node, loc), _at_full_size(node, scale))
    return Prior(_at_full_size(node, density), gaussian)


def _at_full_size(node: Any, values: Tensor) -> Tensor:
    """Return what broadcasts to all rows of the plates, of which the trace saw some."""
    for frame in node["cond_indep_stack"]:
        full_size = frame.full_size or frame.size
        dim = frame.dim - node["fn"].event_dim
        if full_size == frame.size or values.dim() < -dim:
            continue
        row = values.narrow(dim, 0, 1)
        if not (values == row).all():
            msg = (
                f"its prior differs along the plate {frame.name!r}, of which only {frame.size} of "
                f"{full_size} rows were seen"
            )
            raise _VaryingPriorError(msg)
        values = row
    return values


def _check_shape(node: Any, site: Site) -> None:
    shape = list(node["fn"].shape())
    for frame in node["cond_indep_stack"]:
        shape[frame.dim - node["fn"].event_dim] = frame.full_size or frame.size
    if tuple(shape) != tuple(site.shape):
        msg = (
            f"the site {site.name!r} has shape {tuple(site.shape)} in the guide and "
            f"{tuple(shape)} in the model. Expected the model that the guide was trained for, "
            "called with arguments of the same sizes; if a second guide took the parameters of a "
            "first one of the same name, call pyro.clear_param_store() between them"
        )
        raise ValueError(msg)


def _collapse(tensor: Tensor) -> Tensor:
    """Take one element of each dimension along which a tensor was expanded."""
    tensor = detach_provenance(tensor)
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _masked(density: Tensor, mask: Tensor | bool | None, event_dim: int) -> Tensor:
    if mask is None:
        return density
    mask = torch.as_tensor(mask, device=density.device)
    return torch.where(mask[(...,) + (None,) * event_dim], density, torch.inf)
