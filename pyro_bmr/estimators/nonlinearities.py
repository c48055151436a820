r"""The mean and the variance of a nonlinear function of Gaussian elements.

Each function takes the means and the variances of independent Gaussian elements, as plain tensors
of one shape, and is elementwise unless it says otherwise. A variance of exactly zero is a constant:
it gives the function's own value, a variance of exactly zero, and finite gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# An odd number of nodes has one at the mean itself, so that a constant comes out as it went in.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(31)
_WEIGHTS = _WEIGHTS / math.sqrt(2 * math.pi)
_CERTAIN = 40.0


def quadrature_points(loc: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the points and the weights of Gauss-Hermite quadrature with 31 nodes.

    .. math:: \mathbb{E}[f(x)] \approx \sum_k w_k f(m + \sqrt{v}\, t_k)

    Points have a new first dimension of 31, with ``loc`` in the middle; weights sum to one.
    """
    nodes, weights = (
        loc.new_tensor(values.tolist()).reshape(-1, *[1] * loc.dim())
        for values in (_NODES, _WEIGHTS)
    )
    # The slope of the root at zero is infinite: the root never sees a zero.
    random = variance > 0
    scale = torch.where(random, torch.where(random, variance, 1).sqrt(), 0)
    return loc + scale * nodes, weights


def smooth_moments(
    function: Callable[[Tensor], Tensor], loc: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Push elements through a smooth function, by Gauss-Hermite quadrature.

    For sigmoid, softplus, silu, gelu and mish, the error in the mean is at most 1e-9 for a
    standard deviation of 1, 1e-5 for 2, 5e-4 for 3 and 2e-2 for 5; for tanh it is 4e-7, 6e-4, 6e-3
    and 3e-2; for elu, which has a kink in its slope, 6e-4, 3e-3, 6e-3 and 2e-2. The error in the
    variance is at most ten times that.
    """
    points, weights = quadrature_points(loc, variance)
    values = function(points)
    center = values[len(values) // 2]
    mean = center + (weights * (values - center)).sum(0)
    spread = (weights * (values - mean).square()).sum(0)
    return mean, torch.where(variance > 0, spread, 0)


def exp_moments(loc: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Take the exponential: exactly :math:`e^{m + v/2}` and :math:`(e^v - 1)\, e^{2m + v}`."""
    mean = (loc + 0.5 * variance).exp()
    return mean, variance.expm1() * mean.square()


def square_moments(loc: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Take the square: exactly :math:`m^2 + v` and :math:`2 v^2 + 4 m^2 v`."""
    return loc.square() + variance, 2 * variance * (variance + 2 * loc.square())


def relu_moments(
    loc: Tensor, variance: Tensor, negative_slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Push elements through a (leaky) relu, in closed form.

    .. math:: \mathbb{E}[x_+] = m \Phi(m/s) + s \phi(m/s), \quad
              \mathbb{E}[x_+^2] = (m^2 + s^2) \Phi(m/s) + m s \phi(m/s)

    and a leaky relu is :math:`c x + (1 - c) x_+`, with
    :math:`\operatorname{Cov}[x, x_+] = s^2 \Phi(m/s)` (Stein).
    Source: Frey & Hinton (1999), Neural Computation 11(1).
    """
    mean, rectified, probability = _rectify(loc, variance)
    c = negative_slope
    if c == 0:
        return mean, rectified
    covariance = variance * probability
    spread = c**2 * variance + (1 - c) ** 2 * rectified + 2 * c * (1 - c) * covariance
    return c * loc + (1 - c) * mean, spread.clamp(min=0)


def max_moments(loc: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Take the maximum over the last dimension, pair by pair (Clark).

    The moments of the maximum of two Gaussians are exact. It is then taken for a Gaussian itself,
    which is an approximation where there are more than two elements. Source: Clark (1961),
    Operations Research 9(2).
    """
    while loc.shape[-1] > 1:
        half = loc.shape[-1] // 2
        (m1, m2, m_rest), (v1, v2, v_rest) = (
            t.tensor_split([half, 2 * half], dim=-1) for t in (loc, variance)
        )
        # With a the larger mean, max(a, b) = a + (b − a)₊ and Cov[a, (b − a)₊] = −v_a P(b > a):
        # nothing large cancels in the variance v_a (1 − 2 P(b > a)) + Var[(b − a)₊].
        first = m1 >= m2
        larger = torch.where(first, m1, m2)
        spread = torch.where(first, v1, v2)
        gain, gain_variance, overtakes = _rectify(torch.where(first, m2 - m1, m1 - m2), v1 + v2)
        loc = torch.cat([larger + gain, m_rest], -1)
        variance = torch.cat([spread * (1 - 2 * overtakes) + gain_variance, v_rest], -1)
    return loc[..., 0], variance[..., 0]


def logsumexp_bound(
    loc: Tensor, variance: Tensor, dim: int | tuple[int, ...], keepdim: bool = False
) -> Tensor:
    r"""Bound the expected log-sum-exp of independent Gaussians from above.

    .. math:: \mathbb{E}\Big[\ln \sum_j e^{x_j}\Big] \le \tfrac12 \sum_j a_j^2 v_j
              + \ln \sum_j e^{m_j + (1 - 2 a_j) v_j / 2}

    for any :math:`a`, equal for variances of zero. Ten steps lead towards the best :math:`a`, and
    each of them lowers the bound: to within 2e-3 of its minimum for variances up to 10. The
    gradient takes :math:`a` for a constant, as it may at the minimum. Source: Knowles & Minka
    (2011), NeurIPS; the step by Böhning & Lindsay (1988), Ann. Inst. Stat. Math. 40(4).
    """
    m, v = loc.detach(), variance.detach()
    a = _softmax(m, dim)
    for _ in range(10):
        # In a, the bound has the gradient V (a − p) and the Hessian V + V (diag p − p pᵀ) V, for
        # p = softmax(m + (1 − 2a) v / 2). The middle is at most ½, so that the Hessian is at most
        # V (1 + V / 2), and a Newton step with that in its place never goes up.
        a = a - (a - _softmax(m + (0.5 - a) * v, dim)) / (1 + 0.5 * v)
    tilted = torch.logsumexp(loc + (0.5 - a) * variance, dim, keepdim)
    return 0.5 * (a.square() * variance).sum(dim, keepdim) + tilted


def _softmax(logits: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return (logits - torch.logsumexp(logits, dim, keepdim=True)).exp()


def _rectify(loc: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Return the mean and the variance of y₊, and P(y > 0), of y ~ N(m, s²). With x = |m| / s, the
    # density φ(x) and Mills' ratio R = Φ(−x) / φ(x), the half of y beyond zero from m has
    #     g = φ (1 − x R)             the mean in units of s,
    #     h = φ ((1 + x²) R − x)      the second moment in units of s².
    # The mean is m₊ + s g. The variance in units of s² is h − g² where m <= 0, and where m > 0,
    # from y₊ = y + (−y)₊, it is 1 − h − g (2x + g). The textbook E[y₊²] − E[y₊]² would cancel
    # terms x² times as large. Beyond 40 s, the sign of y is certain to the last digit.
    positive = loc > 0
    random = (_CERTAIN**2 * variance > loc.square()) & (variance > torch.finfo(loc.dtype).tiny)
    v = torch.where(random, variance, 1)
    s = v.sqrt()
    x = torch.where(random, torch.where(positive, loc, -loc), 1) / s
    density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(x / math.sqrt(2))
    g = density * (1 - x * mills).clamp(min=0)
    h = density * ((1 + x.square()) * mills - x).clamp(min=0)
    share = torch.where(positive, 1 - h - g * (2 * x + g), h - g.square()).clamp(min=0)
    mean = torch.where(positive, loc, 0) + torch.where(random, s * g, 0)
    rectified = torch.where(random, v * share, torch.where(positive, variance, 0))
    tail = torch.where(random, density * mills, 0)
    return mean, rectified, torch.where(positive, 1 - tail, tail)
