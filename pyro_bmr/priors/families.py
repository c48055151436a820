"""What the prior of a sample site is: its density at zero, and whether it is Gaussian.

`log_density_at_zero` is where a prior family is registered; `read_rows` reads a site of a trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Cauchy,
    ComposeTransform,
    Distribution,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    Transform,
    TransformedDistribution,
    biject_to,
)

from pyro_bmr.arguments.checks import check_kind
from pyro_bmr.display import a_or_an
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.mathematics.transfers import to_host
from pyro_bmr.programs.distributions import (
    CORRELATED,
    PrunedDistribution,
    PrunedMultivariateNormal,
    find_core,
    find_element_support,
)
from pyro_bmr.programs.switching import SwitchedDistribution


class UnregisteredPriorError(TypeError):
    """A prior whose density at zero this package does not know how to read."""


@singledispatch
def log_density_at_zero(prior: Any) -> Tensor:
    """Return ln p(θ = 0) of each element of a prior, of a MultivariateNormal that of its marginals.

    Register a family of your own with ``@log_density_at_zero.register``. Elements whose density
    at 0 is infinite, as is that of a horseshoe over all its scales, are reported and kept.

    Parameters
    ----------
    prior : Distribution
        A distribution over the real line, in any wrapping; or one that the bijection to its
        support makes of such a distribution, as LogNormal of Normal, in the coordinates of the
        latter.

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
    check_kind("prior", prior, Distribution, "a distribution of torch or Pyro")
    raise UnregisteredPriorError(_unregistered(prior))


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
    # A scale of 0 makes it a point mass.
    at_a_point = torch.where(parameters["loc"] == 0, torch.inf, -torch.inf)
    return torch.where(parameters["scale"] == 0, at_a_point, collapsed.log_prob(zero))


@log_density_at_zero.register
def _(prior: MultivariateNormal) -> Tensor:
    return log_density_at_zero(_marginals(prior))


@log_density_at_zero.register
def _(prior: LowRankMultivariateNormal) -> Tensor:
    return log_density_at_zero(_marginals(prior))


@log_density_at_zero.register(Independent)
@log_density_at_zero.register(ExpandedDistribution)
def _(prior: Any) -> Tensor:
    return log_density_at_zero(prior.base_dist)


@log_density_at_zero.register(PrunedDistribution)
@log_density_at_zero.register(PrunedMultivariateNormal)
def _(prior: Any) -> Tensor:  # noqa: ARG001
    msg = (
        "it is a site of a pruned model, whose own guide is the one to reduce: reduce(result.guide)"
    )
    raise UnregisteredPriorError(msg)


@log_density_at_zero.register
def _(prior: SwitchedDistribution) -> Tensor:
    kept, taken = (log_density_at_zero(fn) for fn in (prior.base_dist, prior.other))
    return torch.where(prior.mask, kept, taken)


@log_density_at_zero.register(MaskedDistribution)
def _(prior: Any) -> Tensor:
    return _masked(log_density_at_zero(prior.base_dist), prior._mask, prior.event_dim)


@log_density_at_zero.register
def _(prior: MixtureSameFamily) -> Tensor:
    if prior.event_shape:
        msg = (
            "its prior is a mixture of vectors, whose elements depend on each other. Expected a "
            "mixture per element, such as MixtureSameFamily(Categorical(...), Normal(...))"
        )
        raise UnregisteredPriorError(msg)
    given = vars(prior.mixture_distribution)
    if "probs" in given:
        log_weights = _collapse(given["probs"]).double().log()
    else:
        log_weights = _collapse(given["logits"]).double()
    return (log_weights + log_density_at_zero(prior.component_distribution)).logsumexp(-1)


@log_density_at_zero.register
def _(prior: TransformedDistribution) -> Tensor:
    if not is_transformed_by_support(prior):
        raise UnregisteredPriorError(_unregistered(prior))
    return log_density_at_zero(prior.base_dist)


class UnreadablePriorError(ValueError):
    """A prior of a known family that cannot be reduced where it stands."""


@dataclass(frozen=True)
class Reading:
    """The prior of a site in float64; one row for all of a plate where it was expanded from one.

    ``log_density`` is ln p(θ = 0) in nats, ``inf`` also where there is no prior (``masked``).
    ``joint`` is of all elements, where they are correlated.
    """

    log_density: Tensor
    masked: Tensor
    gaussian: Diagonal | None = None
    joint: Moments | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All but those of ``joint``."""
        gaussian = [] if self.gaussian is None else [self.gaussian.loc, self.gaussian.scale]
        return [self.log_density, self.masked, *gaussian]

    @property
    def is_small(self) -> bool:
        """Whether it is one number per tensor."""
        return self.joint is None and all(tensor.numel() == 1 for tensor in self.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Reading:
        """Return it with others in the place of ``tensors``."""
        density, masked, *gaussian = tensors
        return Reading(density, masked, Diagonal(*gaussian) if gaussian else None, self.joint)


def read_rows(node: Any) -> Reading:
    """Read the prior of a site of a trace, in the rows of plates that this has."""
    fn = node["fn"]
    core = find_core(fn)
    if is_transformed_by_support(core):
        core = find_core(core.base_dist)
    density = detach_provenance(log_density_at_zero(fn)).detach()
    masked = torch.zeros_like(density, dtype=torch.bool)
    if _is_masked(node):
        density = _masked(density, node["mask"], fn.event_dim)
        bare = detach_provenance(log_density_at_zero(core)).detach()
        masked = density.isposinf() & ~bare.isposinf()
    if isinstance(core, CORRELATED):
        return Reading(density, masked, joint=_read_joint(node, core))
    if not isinstance(core, Normal):
        return Reading(density, masked)
    loc, scale = (_collapse(t).detach().double() for t in (core.loc, core.scale))
    return Reading(density, masked, Diagonal(loc, scale))


def check_readings(readings: Mapping[str, Reading]) -> tuple[dict[str, Reading], dict[str, str]]:
    """Return readings that are of use, small ones on the CPU, and why the others are of none."""
    small = {name: one for name, one in readings.items() if one.is_small}
    moved = iter(to_host([tensor for one in small.values() for tensor in one.tensors]))
    there = {
        name: one.with_tensors([next(moved) for _ in one.tensors]) for name, one in small.items()
    }
    found = {name: there.get(name, one) for name, one in readings.items()}
    useless = {name: why for name, one in found.items() if (why := _find_fault(one))}
    return {name: one for name, one in found.items() if name not in useless}, useless


def _find_fault(reading: Reading) -> str:
    density, masked = reading.log_density, reading.masked
    if density.isnan().any() or (density == -torch.inf).any():
        return "its prior density at zero is 0 or not a number"
    return "it is masked out" if masked.numel() and masked.all() else ""


def _read_joint(node: Any, core: Any) -> Moments:
    """Read the mean and covariance of all elements of a site, whose last axis is correlated."""
    if any(frame.full_size not in (None, frame.size) for frame in node["cond_indep_stack"]):
        msg = (
            f"its prior is {a_or_an(core)}, of which a sub-sampling plate shows only some "
            "rows; pass arguments that show all rows"
        )
        raise UnreadablePriorError(msg)
    if _is_masked(node):
        msg = f"its prior is {a_or_an(core)}, of which some is masked"
        raise UnreadablePriorError(msg)
    shape = node["fn"].shape()
    if shape.numel() > MOST_JOINT:
        msg = (
            f"its prior is {a_or_an(core)} of {shape.numel():,} elements, more than {MOST_JOINT:,}"
        )
        raise UnreadablePriorError(msg)
    loc, covariance = (
        detach_provenance(t).detach().double() for t in (core.loc, core.covariance_matrix)
    )
    rows = covariance.expand(*shape, shape[-1]).reshape(-1, shape[-1], shape[-1])
    return Moments(loc.expand(shape).reshape(-1), torch.block_diag(*rows))


# More correlated elements than this take too much memory.
MOST_JOINT = 4_096


def _is_masked(node: Any) -> bool:
    return not (node["mask"] is None or node["mask"] is True) or _has_mask(node["fn"])


def _has_mask(fn: Any) -> bool:
    while isinstance(fn, Independent | ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, MaskedDistribution)


def _marginals(prior: Any) -> Normal:
    return Normal(prior.loc, prior.variance.sqrt(), validate_args=False)


def _unregistered(prior: Any) -> str:
    return (
        f"its prior is {a_or_an(prior)}, whose density at zero is not registered "
        "(pyro_bmr.extend.log_density_at_zero.register adds a family)"
    )


def is_transformed_by_support(fn: Any) -> bool:
    """Tell whether an unwrapped prior is one over the real line on its support, as LogNormal is."""
    if not isinstance(fn, TransformedDistribution) or fn.event_shape:
        return False
    bijection = biject_to(find_element_support(fn.support))
    return _parts(fn.transforms) == _parts([bijection])


def _parts(transforms: list[Any]) -> list[Transform]:
    """Flatten a composition, without the parts that change nothing."""
    parts: list[Transform] = []
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            parts += _parts(transform.parts)
        elif transform != AffineTransform(0.0, 1.0):
            parts.append(transform)
    return parts


def _collapse(tensor: Tensor) -> Tensor:
    """Take one element of each dimension along which a tensor was expanded."""
    tensor = detach_provenance(tensor)
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _masked(density: Tensor, mask: Tensor | bool | None, event_dim: int) -> Tensor:
    if mask is None:
        return density
    mask = torch.as_tensor(mask, device=density.device)
    return torch.where(mask[(...,) + (None,) * event_dim], density, torch.inf)
