"""Distributions with elements at exactly zero, in unconstrained coordinates."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    MultivariateNormal,
    TorchDistribution,
)
from torch import Tensor
from torch import distributions as td
from torch.distributions import (
    biject_to,
    constraints,
    kl_divergence,
    register_kl,
)
from torch.distributions.constraints import MixtureSameFamilyConstraint
from typing_extensions import override

from pyro_bmr.display import a_or_an
from pyro_bmr.programs.centers import Center

_ELSEWHERE = (
    "a pruned element has a value other than {}. Expected the guide of the same reduction: use "
    "result.model with result.guide, not with the full guide, a fresh one, or MCMC"
)
CORRELATED = (td.MultivariateNormal, td.LowRankMultivariateNormal)

POSITIVE = (constraints.positive, constraints.nonnegative)


def is_positive(support: constraints.Constraint) -> bool:
    """Tell whether a support is that of positive numbers, also where it is a copy."""
    return any(
        type(support) is type(known) and getattr(support, "lower_bound", None) == 0
        for known in POSITIVE
    )


class PrunedDistribution(TorchDistribution):
    r"""Independent univariate elements; those with a False mask are a point mass at zero.

    .. math:: \ln p(\theta) = \sum_{i \in \text{kept}} \ln p_0(\theta_i)
              + \sum_{i \notin \text{kept}} \ln \delta(\theta_i)

    A pruned element is 0 in every draw and adds exactly 0 to the log density; any other value has
    the log density ``-inf``, and is an error where arguments are validated. Where there is a
    ``center``, of the shape of the batch, a pruned element is there instead.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        base_dist: TorchDistribution,
        mask: Tensor,
        center: Center | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.base_dist = base_dist
        self.mask = mask.expand(base_dist.batch_shape)
        self.center = center
        super().__init__(base_dist.batch_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients."""
        return self.base_dist.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """The support of the kept elements."""
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        """The mean; where pruned, the point."""
        return self.put_at_origin(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """The variance, 0 where pruned."""
        return torch.where(self.mask, self.base_dist.variance, 0)

    def origin(self, like: Tensor) -> Tensor | float:
        """Return where pruned elements are: where their center is on the support."""
        support = find_element_support(self.support)
        if self.center is None and support is constraints.real:
            return 0.0
        center = like.new_zeros(()) if self.center is None else self.center.locate(self.base_dist)
        return biject_to(support)(center.to(device=like.device, dtype=like.dtype))

    def put_at_origin(self, value: Tensor) -> Tensor:
        """Put the pruned elements of a value at the origin."""
        # Draws in parallel have one dimension less than the distribution that Pyro expanded.
        mask = self.mask[(0,) * max(0, self.mask.dim() - value.dim())]
        origin = self.origin(value)
        if isinstance(origin, Tensor):
            origin = origin[(0,) * max(0, origin.dim() - value.dim())]
        return torch.where(mask, value, origin)

    @override
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.put_at_origin(self.base_dist.sample(sample_shape))

    @override
    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.put_at_origin(self.base_dist.rsample(sample_shape))

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        origin = self.origin(value)
        if self.center is None:
            at_origin = value == origin
        else:  # which guide and model compute each in its own way
            there = torch.as_tensor(origin, device=value.device)
            at_origin = torch.isclose(value, there, rtol=1e-4, atol=1e-6)
        if self._validate_args and not (self.mask | at_origin).all():
            raise ValueError(_ELSEWHERE.format(origin))
        spike = torch.where(at_origin, 0.0, -torch.inf)
        if self.center is not None:  # which need not be inside the support
            inside = biject_to(find_element_support(self.support))(torch.zeros_like(value))
            value = torch.where(self.mask, value, inside)
        return torch.where(self.mask, self.base_dist.log_prob(value), spike)

    @override
    def expand(
        self, batch_shape: torch.Size, _instance: PrunedDistribution | None = None
    ) -> PrunedDistribution:
        batch_shape = torch.Size(batch_shape)
        new = self._get_checked_instance(PrunedDistribution, _instance)
        new.base_dist = self.base_dist.expand(batch_shape)
        new.mask = self.mask.expand(batch_shape)
        new.center = self.center
        super(PrunedDistribution, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


def prune_distribution(
    fn: TorchDistribution, mask: Tensor, center: Center | None = None, *, marginal: bool = False
) -> TorchDistribution:
    """Put elements at zero or a center, inside any ``to_event`` and ``mask``; True keeps.

    ``marginal`` says which prior is left of correlated elements. A ValueError says that the mask
    does not broadcast to ``fn.shape()``, or that the elements are not independent.
    """
    shape = fn.shape()
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        msg = (
            f"a mask of shape {tuple(mask.shape)} does not fit a distribution of shape "
            f"{tuple(shape)}. Expected the shape of the sample site"
        )
        raise ValueError(msg)
    if isinstance(fn, Independent):
        inner = prune_distribution(fn.base_dist, mask, center, marginal=marginal)
        return Independent(inner, fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        inner = prune_distribution(fn.base_dist, mask, center, marginal=marginal)
        return MaskedDistribution(inner, fn._mask)
    if isinstance(fn, ExpandedDistribution) and isinstance(find_core(fn), CORRELATED):
        inner = find_core(fn).expand(fn.batch_shape)
        return prune_distribution(inner, mask, center, marginal=marginal)
    if isinstance(fn, CORRELATED) and center is None:
        return PrunedMultivariateNormal(fn, mask, marginal)
    if fn.event_dim:
        msg = (
            f"elements of {a_or_an(fn)} cannot be put at zero one by one, because they "
            "are not independent. Expected univariate elements, such as Normal(...).to_event(n)"
        )
        raise ValueError(msg)
    return PrunedDistribution(fn, mask, center)


class PrunedMultivariateNormal(TorchDistribution):
    r"""A correlated Gaussian, of which the elements with a False mask are zero.

    What is kept has the density given that the rest is zero, of which the precision is the block of
    what is kept; or, if ``marginal``, its marginal density, of which the covariance is. A pruned
    element adds exactly 0 to the log density.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(
        self,
        base_dist: Any,
        mask: Tensor,
        marginal: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.base_dist, self.marginal, self.center = base_dist, marginal, None
        self.mask = mask.expand(base_dist.batch_shape + base_dist.event_shape)
        shapes = base_dist.batch_shape, base_dist.event_shape
        super().__init__(*shapes, validate_args=validate_args)

    @cached_property
    def kept(self) -> MultivariateNormal:
        """What is kept, beside standard normals in the place of what is not."""
        both = self.mask[..., :, None] & self.mask[..., None, :]
        base = self.base_dist
        if self.marginal:
            loc = torch.where(self.mask, base.loc, 0)
            covariance = base.covariance_matrix * both + self._ones()
            return MultivariateNormal(loc, covariance, validate_args=False)
        precision = base.precision_matrix
        linear = torch.where(self.mask, (precision @ base.loc[..., None])[..., 0], 0)
        inner = precision * both + self._ones()
        loc = torch.linalg.solve(inner, linear[..., None])[..., 0]
        return MultivariateNormal(loc, precision_matrix=inner, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean, 0 where pruned."""
        return self.put_at_origin(self.kept.mean)

    @property
    def variance(self) -> Tensor:
        """The variance, 0 where pruned."""
        return self.put_at_origin(self.kept.variance)

    def put_at_origin(self, value: Tensor) -> Tensor:
        """Put the pruned elements of a value at zero."""
        mask = self.mask[(0,) * max(0, self.mask.dim() - value.dim())]
        return torch.where(mask, value, 0)

    @override
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.put_at_origin(self.kept.sample(sample_shape))

    @override
    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self.put_at_origin(self.kept.rsample(sample_shape))

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        at_zero = self.mask | (value == 0)
        if self._validate_args and not at_zero.all():
            raise ValueError(_ELSEWHERE.format(0.0))
        # The standard normals have this density at zero.
        standard = 0.5 * math.log(2 * math.pi) * (~self.mask).sum(-1)
        inside = self.kept.log_prob(self.put_at_origin(value)) + standard
        return torch.where(at_zero.all(-1), inside, -torch.inf)

    @override
    def expand(
        self, batch_shape: torch.Size, _instance: PrunedMultivariateNormal | None = None
    ) -> PrunedMultivariateNormal:
        batch_shape = torch.Size(batch_shape)
        mask = self.mask.expand(batch_shape + self.event_shape)
        base = self.base_dist.expand(batch_shape)
        return PrunedMultivariateNormal(base, mask, self.marginal, self._validate_args)

    def _ones(self) -> Tensor:
        return torch.where(self.mask, 0, 1).to(self.base_dist.loc.dtype).diag_embed()


def find_element_support(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support of one element, without what ``to_event`` or a mixture put around it."""
    while isinstance(support, constraints.independent | MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def find_support(fn: Any) -> constraints.Constraint:
    """Return the support of a distribution, that of the components for a mixture.

    `torch.distributions.biject_to` has no map for the constraint that torch gives to mixtures.
    """
    return _without_mixtures(fn.support)


def _without_mixtures(support: constraints.Constraint) -> constraints.Constraint:
    if isinstance(support, MixtureSameFamilyConstraint):
        return _without_mixtures(support.base_constraint)
    if not isinstance(support, constraints.independent):
        return support
    base = _without_mixtures(support.base_constraint)
    return constraints.independent(base, support.reinterpreted_batch_ndims)


def find_core(fn: Any) -> Any:
    """Unwrap a distribution from ``to_event``, ``mask`` and ``expand``."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_pruned(fn: TorchDistribution) -> bool:
    """Tell whether `prune_distribution` made a distribution."""
    return isinstance(find_core(fn), PrunedDistribution | PrunedMultivariateNormal)


@register_kl(PrunedDistribution, PrunedDistribution)
def _(q: PrunedDistribution, p: PrunedDistribution) -> Tensor:
    # Where both are the same point mass, their divergence is 0.
    divergence = kl_divergence(q.base_dist, p.base_dist)
    return torch.where(q.mask == p.mask, torch.where(q.mask, divergence, 0), torch.inf)


@register_kl(Independent, PrunedMultivariateNormal)
def _(q: Any, p: PrunedMultivariateNormal) -> Tensor:
    core = find_core(q)
    normal = find_core(core.base_dist) if isinstance(core, PrunedDistribution) else core
    if not isinstance(normal, td.Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    mask = core.mask if core is not normal else torch.ones_like(p.mask)
    # Beside what is kept there are standard normals in both, which add nothing.
    loc, scale = torch.where(mask, normal.loc, 0), torch.where(mask, normal.scale, 1)
    divergence = kl_divergence(MultivariateNormal(loc, scale_tril=scale.diag_embed()), p.kept)
    return torch.where((mask == p.mask).all(-1), divergence, torch.inf)
