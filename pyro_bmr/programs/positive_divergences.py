r"""Divergences of LogNormal and Gamma posteriors from priors over positive numbers.

.. math:: KL(q \,\|\, p) = E_q[\ln q(x)] - E_q[\ln p(x)]

of which torch knows few pairs. The priors here need no more of q than :math:`E[x]`, :math:`E[x^2]`,
:math:`E[\ln x]` and :math:`Var[\ln x]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Exponential,
    Gamma,
    HalfNormal,
    LogNormal,
    kl_divergence,
    register_kl,
)

from pyro_bmr.display import a_or_an

_LOG_2PI = math.log(2 * math.pi)
# Nodes of Gauss-Hermite quadrature.
_NODES = 48


def divergence(posterior: LogNormal | Gamma, prior: Any) -> Tensor:
    """Return KL(q ‖ p) of each element in nats, by quadrature where it is not closed.

    A NotImplementedError says that it is not known.
    """
    try:
        return kl_divergence(posterior, prior)
    except NotImplementedError:
        if isinstance(posterior, LogNormal):
            return _integrate(posterior, prior)
        msg = f"the divergence of a Gamma posterior from {a_or_an(prior)} is not known"
        raise NotImplementedError(msg) from None


@dataclass(frozen=True)
class _Moments:
    mean: Tensor
    mean_square: Tensor
    log_mean: Tensor
    log_variance: Tensor
    entropy: Tensor


def _moments(q: LogNormal | Gamma) -> _Moments:
    mean, square = q.mean, q.variance + q.mean.square()
    if isinstance(q, LogNormal):
        entropy = q.loc + q.scale.log() + 0.5 + 0.5 * _LOG_2PI
        return _Moments(mean, square, q.loc, q.scale.square(), entropy)
    log_mean = q.concentration.digamma() - q.rate.log()
    log_variance = torch.polygamma(1, q.concentration)
    return _Moments(mean, square, log_mean, log_variance, q.entropy())


def _from_gamma(q: _Moments, p: Gamma) -> Tensor:
    normalizer = p.concentration * p.rate.log() - p.concentration.lgamma()
    return normalizer + (p.concentration - 1) * q.log_mean - p.rate * q.mean


def _from_exponential(q: _Moments, p: Exponential) -> Tensor:
    return p.rate.log() - p.rate * q.mean


def _from_half_normal(q: _Moments, p: HalfNormal) -> Tensor:
    precision = p.scale**-2
    return 0.5 * (math.log(4) - _LOG_2PI + precision.log() - precision * q.mean_square)


def _from_log_normal(q: _Moments, p: LogNormal) -> Tensor:
    square = (q.log_mean - p.loc).square() + q.log_variance
    return -q.log_mean - p.scale.log() - 0.5 * (_LOG_2PI + square / p.scale.square())


_EXPECTED: Any = {
    (LogNormal, Gamma): _from_gamma,
    (LogNormal, Exponential): _from_exponential,
    (LogNormal, HalfNormal): _from_half_normal,
    (Gamma, HalfNormal): _from_half_normal,
    (Gamma, LogNormal): _from_log_normal,
}


def _register(kinds: tuple[type, type], expected: Any) -> None:
    @register_kl(*kinds)
    def _(q: Any, p: Any) -> Tensor:
        moments = _moments(q)
        return -moments.entropy - expected(moments, p)


for _kinds, _expected in _EXPECTED.items():
    _register(_kinds, _expected)


def _integrate(q: LogNormal, p: Any) -> Tensor:
    nodes, weights = (
        torch.from_numpy(t).to(q.loc) for t in np.polynomial.hermite_e.hermegauss(_NODES)
    )
    total = -_moments(q).entropy
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        total = total - weight * p.log_prob((q.loc + q.scale * node).exp())
    return total
