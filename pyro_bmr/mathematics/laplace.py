r"""A Laplace reduced prior under a Gaussian posterior and prior, in closed form.

The ratio of posterior and prior is an unnormalised Gaussian, and the Laplace density turns it into
one Gaussian on each side of zero. With :math:`\Lambda = 1/s - 1/s_0` and
:math:`h = \mu/s - \mu_0/s_0`, the halves are those of
:math:`\exp(-\tfrac12 \Lambda \theta^2 + (h \mp 1/b)\theta)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import erfcx

from pyro_bmr.mathematics.gaussian import Diagonal


def reduce_to_laplace(
    posterior: Diagonal, prior: Diagonal, scale: Tensor
) -> tuple[Tensor, Diagonal]:
    r"""Return ΔF of a Laplace reduced prior for every element, and the moments that it leads to.

    .. math:: -\Delta F = \ln \int N(\theta; \mu, s) \,
              \frac{\exp(-|\theta| / b)}{2 b \, N(\theta; \mu_0, s_0)} \, d\theta

    Where the posterior is not narrower than the prior, ``inf``, and moments that are NaN.
    """
    s, s0 = (g.scale.double().square() for g in (posterior, prior))
    mean, mean0, b = posterior.loc.double(), prior.loc.double(), scale.double()
    precision = (s0 - s) / (s * s0)
    precision = torch.where(precision > 0, precision, torch.nan)
    linear = mean / s - mean0 / s0
    whole = 0.5 * (s0 / s).log() - (2 * b).log()
    halves = []
    for side in (1, -1):
        slope = side * linear - 1 / b
        # ∫ exp(−Λθ²/2 + gθ) over θ > 0 is √(π/2Λ) erfcx(−g/√(2Λ)). Where g > 0 the exponential in
        # erfcx is large, and is taken together with the prior's and the posterior's on paper.
        t = -slope / (2 * precision).sqrt()
        far = 0.5 * (mean0.square() / s0 - mean.square() / s) + erfcx(t.clamp(min=0)).log()
        near = 0.5 * (mean - mean0).square() / (s0 - s)
        near = near + (0.5 / b - side * linear) / (b * precision) + torch.erfc(t.clamp(max=0)).log()
        log_mass = torch.where(t > 0, far, near) + 0.5 * (0.5 * math.pi / precision).log()
        halves.append(_Half(log_mass, *_moments(slope / precision.sqrt())))
    positive, negative = halves
    log_mass = torch.logaddexp(positive.log_mass, negative.log_mass)
    weight = (positive.log_mass - log_mass).exp()
    other = (negative.log_mass - log_mass).exp()
    loc = weight * positive.mean - other * negative.mean
    apart = weight * other * (positive.mean + negative.mean).square()
    variance = weight * positive.variance + other * negative.variance + apart
    unit = precision.rsqrt()
    delta_f = torch.where(precision.isnan(), torch.inf, -(whole + log_mass))
    return delta_f, Diagonal(loc * unit, variance.sqrt() * unit)


@dataclass(frozen=True)
class _Half:
    """One side of zero: its mass, and the moments of |θ| √Λ there."""

    log_mass: Tensor
    mean: Tensor
    variance: Tensor


# Below, the mean of a truncated normal is the difference of two large numbers.
_FAR = -100.0


def _moments(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of N(u, 1), given that it is positive."""
    hazard = math.sqrt(2 / math.pi) / erfcx(-u / math.sqrt(2))
    mean = u + hazard
    variance = 1 - hazard * mean
    far = u.clamp(max=_FAR).pow(-2)
    # The asymptotic series of Mills' ratio.
    far_mean = far.sqrt() * (1 - far * (2 - far * (10 - 74 * far)))
    far_variance = far * (1 - far * (6 - far * (50 - 518 * far)))
    return torch.where(u < _FAR, far_mean, mean), torch.where(u < _FAR, far_variance, variance)
