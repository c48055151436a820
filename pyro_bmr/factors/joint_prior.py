"""A correlated prior of the elements of a factor, and what it makes of a posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.mathematics.contrast import Contrast, contrast_conditional, contrast_marginal
from pyro_bmr.mathematics.gaussian import LOG_2PI
from pyro_bmr.mathematics.moments import Moments
from pyro_bmr.mathematics.singular_contrast import SingularContrast, contrast_singular

# ln p(θ_i = 0) of the standard normals that a joint prior takes the place of.
STANDARD = -0.5 * LOG_2PI


@dataclass(frozen=True)
class JointPrior:
    """A Gaussian over all elements of a factor, pruned ones among them, in float64.

    ``coupled`` is False for elements with a prior of their own, which have a standard normal here.
    ``marginal``: whether what is left keeps its marginal prior; else it has the prior given that
    the rest is zero.
    """

    moments: Moments
    coupled: Tensor
    marginal: bool = False

    def contrast(self, posterior: Moments, left: Tensor) -> Contrast | SingularContrast:
        """Return what ΔF follows from, with the posterior of what is ``left`` of all elements."""
        whole = self.moments
        prior = whole.select(left) if self.marginal else whole.given_zero(~left)
        if self.marginal:
            return contrast_marginal(posterior, prior, self.coupled[left])
        if prior.singular:
            return contrast_singular(posterior, prior)
        return contrast_conditional(posterior, prior)

    def select(self, stay: Tensor) -> JointPrior:
        """Leave out some elements."""
        return replace(self, moments=self.moments.select(stay), coupled=self.coupled[stay])


def couple_priors(parts: list[Moments | int], marginal: bool, device: torch.device) -> JointPrior:
    """Put the priors of sites together, of which some are so many independent elements."""
    sizes = [part if isinstance(part, int) else len(part.loc) for part in parts]
    moments = [_standard(part) if isinstance(part, int) else part for part in parts]
    coupled = torch.cat(
        [
            torch.full((size,), not isinstance(part, int), device="cpu")
            for part, size in zip(parts, sizes, strict=True)
        ]
    )
    loc = torch.cat([one.loc.to(device) for one in moments])
    covariance = torch.block_diag(*(one.covariance.to(device) for one in moments))
    return JointPrior(Moments(loc, covariance), coupled.to(device), marginal)


def _standard(size: int) -> Moments:
    identity = torch.eye(size, dtype=torch.float64, device="cpu")
    return Moments(torch.zeros_like(identity[:, :1])[:, 0], identity)
