"""A model in which some elements of latent sites have another prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Independent, MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import TransformedDistribution, constraints
from typing_extensions import override

from pyro_bmr.display import a_or_an
from pyro_bmr.programs.distributions import PrunedDistribution
from pyro_bmr.programs.handlers import SiteBuffers
from pyro_bmr.programs.sites import Indices, take
from pyro_bmr.programs.wrappers import ModelWrapper


@dataclass(frozen=True)
class NewPrior:
    """The prior that elements of a site take where ``mask``, of the site's full shape, is False."""

    mask: Tensor
    family: type[TorchDistribution]
    parameters: Mapping[str, Tensor]

    def take(self, kept: Indices) -> NewPrior:
        """Return the prior of a site of which some indices are left."""
        shape = self.mask.shape
        parameters = {name: take(t.expand(shape), kept) for name, t in self.parameters.items()}
        return NewPrior(take(self.mask, kept), self.family, parameters)


class _SwitchMessenger(Messenger):
    """Effect handler that gives some elements of latent sites another prior.

    The distribution of a site is changed before it is sampled, inside ``to_event``, ``mask`` and
    pruning, so that it nests with the messenger of pruning and with itself.
    """

    def __init__(self, priors: Mapping[str, NewPrior]) -> None:
        super().__init__()
        self.priors = priors

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.priors or msg["is_observed"]:
            return
        new = self.priors[msg["name"]]
        event_dim = msg["fn"].event_dim
        parameters = {n: pyro.subsample(t, event_dim=event_dim) for n, t in new.parameters.items()}
        mask = pyro.subsample(new.mask, event_dim=event_dim)
        msg["fn"] = switch_prior(msg["fn"], NewPrior(mask, new.family, parameters))


_PARAMETERS = ("loc", "scale")


class SwitchedModel(ModelWrapper):
    """A Pyro model in which some elements have another prior.

    Called like the model that it wraps. The model itself is shared, not copied.
    """

    def __init__(self, model: Callable[..., Any], priors: Mapping[str, NewPrior]) -> None:
        super().__init__(model)
        self.families = {name: new.family for name, new in priors.items()}
        self.masks = SiteBuffers({name: new.mask.clone() for name, new in priors.items()})
        for key in _PARAMETERS:
            values = {
                n: p.parameters[key].clone() for n, p in priors.items() if key in p.parameters
            }
            setattr(self, key, SiteBuffers(values))

    def new_priors(self) -> dict[str, NewPrior]:
        """Return the priors that the model gives to its elements, where they are now."""
        values = {key: getattr(self, key).by_site() for key in _PARAMETERS}
        masks = self.masks.by_site()
        return {
            name: NewPrior(
                masks[name], family, {key: v[name] for key, v in values.items() if name in v}
            )
            for name, family in self.families.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with _SwitchMessenger(self.new_priors()):
            return self.model(*args, **kwargs)


class SwitchedDistribution(TorchDistribution):
    r"""Independent elements, of which some have another distribution.

    .. math:: \ln p(\theta) = \sum_{i \in \text{kept}} \ln p_0(\theta_i)
              + \sum_{i \notin \text{kept}} \ln r(\theta_i)

    Both are univariate and have the same support; ``mask`` is True for elements of ``base_dist``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        base_dist: TorchDistribution,
        other: TorchDistribution,
        mask: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.base_dist = base_dist
        self.other = other.expand(base_dist.batch_shape)
        self.mask = mask.expand(base_dist.batch_shape)
        super().__init__(base_dist.batch_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients."""
        return self.base_dist.has_rsample and self.other.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """The support of all elements."""
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return torch.where(self.mask, self.base_dist.mean, self.other.mean)

    @property
    def variance(self) -> Tensor:
        """The variance."""
        return torch.where(self.mask, self.base_dist.variance, self.other.variance)

    @override
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return torch.where(
            self.mask, self.base_dist.sample(sample_shape), self.other.sample(sample_shape)
        )

    @override
    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return torch.where(
            self.mask, self.base_dist.rsample(sample_shape), self.other.rsample(sample_shape)
        )

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(self.mask, self.base_dist.log_prob(value), self.other.log_prob(value))

    @override
    def expand(
        self, batch_shape: torch.Size, _instance: SwitchedDistribution | None = None
    ) -> SwitchedDistribution:
        batch_shape = torch.Size(batch_shape)
        new = self._get_checked_instance(SwitchedDistribution, _instance)
        new.base_dist = self.base_dist.expand(batch_shape)
        new.other = self.other.expand(batch_shape)
        new.mask = self.mask.expand(batch_shape)
        super(SwitchedDistribution, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


def switch_prior(fn: Any, new: NewPrior) -> Any:
    """Give some elements of a distribution another one, inside whatever wraps it.

    Elements that keep their family have their parameters changed, so that a Normal stays a Normal;
    others become a `SwitchedDistribution`. A ValueError says that the elements are not independent,
    or that the mask does not fit.
    """
    if isinstance(fn, Independent):
        return Independent(switch_prior(fn.base_dist, new), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(switch_prior(fn.base_dist, new), fn._mask)
    if isinstance(fn, PrunedDistribution):
        return PrunedDistribution(switch_prior(fn.base_dist, new), fn.mask, fn.center)
    shape = fn.batch_shape
    if fn.event_dim or torch.broadcast_shapes(new.mask.shape, shape) != shape:
        msg = (
            f"cannot give elements of {a_or_an(fn)} of shape {tuple(fn.shape())} another "
            f"prior by a mask of shape {tuple(new.mask.shape)}. Expected univariate elements, such "
            "as Normal(...).to_event(n), and a mask of the shape of the sample site"
        )
        raise ValueError(msg)
    parameters = {name: t.expand(shape) for name, t in new.parameters.items()}
    if set(fn.arg_constraints) == set(parameters) and isinstance(fn, _kin(new.family)):
        return type(fn)(
            **{
                name: torch.where(new.mask, getattr(fn, name), t.to(getattr(fn, name)))
                for name, t in parameters.items()
            }
        )
    if isinstance(fn, TransformedDistribution):
        return dist.TransformedDistribution(switch_prior(fn.base_dist, new), fn.transforms)
    return SwitchedDistribution(fn, new.family(**parameters), new.mask)


def _kin(family: type[TorchDistribution]) -> tuple[type, ...]:
    # A site with a LogNormal prior is reduced in coordinates in which that is a Normal.
    return (family, dist.LogNormal) if family is dist.Normal else (family,)
