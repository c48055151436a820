r"""Conjugate families that are not Gaussian: Gamma, Beta and Dirichlet.

In each of them a product of densities adds the parameters and a quotient subtracts them, up to a
constant that cancels in :math:`q r / p`, so that the reduced posterior has the parameters
:math:`q + r - p`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Distribution, Gamma


@dataclass(frozen=True)
class _ConjugateFamily:
    """A family of distributions, by the names of its parameters, all positive.

    ``log_partition`` takes them stacked along the last dimension, and returns nats.
    """

    build: Callable[..., Distribution]
    parameters: tuple[str, ...]
    log_partition: Callable[[Tensor], Tensor]

    def stack(self, fn: Distribution) -> Tensor:
        """Return a distribution's parameters in float64, stacked along the last dimension."""
        values = [getattr(fn, name).double() for name in self.parameters]
        return values[0] if fn.event_shape else torch.stack(values, -1)


def reduced_parameters(
    family: _ConjugateFamily, posterior: Distribution, prior: Distribution, reduced: Distribution
) -> Tensor:
    """Return the parameters of the reduced posterior q·r/p, stacked; NaN where there is none."""
    # In this order, so that r = p changes nothing to the last digit.
    sums = family.stack(posterior) + (family.stack(reduced) - family.stack(prior))
    proper = (sums > 0).all(-1, keepdim=True)
    return torch.where(proper, sums, torch.nan)


def delta_f_conjugate(
    family: _ConjugateFamily, posterior: Distribution, prior: Distribution, reduced: Distribution
) -> Tensor:
    """Score a reduced prior of a conjugate family, in nats; NaN where q·r/p is improper.

    -ΔF = A(q + r - p) - A(q) - A(r) + A(p): Friston, Parr & Zeidman (2018), arXiv:1805.07092.
    """
    after = reduced_parameters(family, posterior, prior, reduced)
    a = family.log_partition
    posteriors = a(after) - a(family.stack(posterior))
    return a(family.stack(reduced)) - a(family.stack(prior)) - posteriors


def build(family: _ConjugateFamily, parameters: Tensor, dtype: torch.dtype) -> Distribution:
    """Make a distribution from stacked parameters."""
    values = parameters.to(dtype)
    split = [values] if len(family.parameters) == 1 else values.unbind(-1)
    return family.build(**dict(zip(family.parameters, split, strict=True)))


def _gamma(parameters: Tensor) -> Tensor:
    concentration, rate = parameters.unbind(-1)
    return concentration.lgamma() - concentration * rate.log()


def _dirichlet(parameters: Tensor) -> Tensor:
    return parameters.lgamma().sum(-1) - parameters.sum(-1).lgamma()


CONJUGATE: dict[type[Distribution], _ConjugateFamily] = {
    Gamma: _ConjugateFamily(dist.Gamma, ("concentration", "rate"), _gamma),
    Beta: _ConjugateFamily(dist.Beta, ("concentration1", "concentration0"), _dirichlet),
    Dirichlet: _ConjugateFamily(dist.Dirichlet, ("concentration",), _dirichlet),
}
