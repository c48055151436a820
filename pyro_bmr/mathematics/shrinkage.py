r"""Gaussian reduced priors under a correlated posterior.

Putting a narrower prior :math:`N(m_r, s_r)` in the place of :math:`N(m_0, s_0)` is conditioning on
a noisy copy of :math:`\theta` being zero,

.. math:: z = J (\theta - y) + \sqrt{s_r} \, \epsilon, \qquad J^2 = 1 - s_r / s_0, \qquad
          y = \frac{m_r s_0 - m_0 s_r}{s_0 - s_r},

because :math:`\ln r(\theta) - \ln p(\theta)` is quadratic with its top at :math:`y`, and
:math:`\Delta F = \ln p(z = 0) - \ln q(z = 0)`: the evidence of a spike, with that of
:math:`\theta = 0` as its limit for :math:`s_r \to 0`. So all that is known of spikes on correlated
elements, such as the order in which they should go, holds for shrinkage too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.mathematics.evidence import delta_f_gaussian, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, Diagonal, LowRank, triangular
from pyro_bmr.mathematics.reduced_posteriors import reduced_gaussian
from pyro_bmr.mathematics.triples import check_proper


def noisy_copy(
    posterior: Dense | LowRank, prior: Diagonal, reduced: Diagonal
) -> tuple[Dense | LowRank, Tensor]:
    """Return the posterior of z and ln p(z = 0): a spike on z scores as ``reduced`` does on θ.

    ``inf`` where the reduced prior is not narrower than the prior, unless the two are equal.

    >>> one = torch.ones(1)
    >>> q, p, r = Dense(one, 0.5 * one[None]), Diagonal(0 * one, one), Diagonal(0 * one, 0.1 * one)
    >>> copy, log_prior = noisy_copy(q, p, r)
    >>> delta_f_spike_chain(copy, log_prior), delta_f_gaussian(Diagonal(one, 0.5 * one), p, r)
    (tensor([1.2440]), tensor([1.2440], dtype=torch.float64))
    """
    gain, offset, noise = _observation(prior, reduced)
    distance = (prior.loc - reduced.loc).square() / (prior.scale.square() - noise)
    log_prior = -0.5 * (LOG_2PI + 2 * prior.scale.log() + distance)
    same = (prior.scale == reduced.scale) & (prior.loc == reduced.loc)
    # An element whose prior stays the same is copied as noise of the prior's variance.
    log_prior = torch.where(same, -0.5 * LOG_2PI - prior.scale.log(), log_prior)
    log_prior = torch.where(same | (reduced.scale < prior.scale), log_prior, torch.inf)
    jacobian = gain.clamp(min=0).sqrt()
    top = torch.where(gain > 0, offset / jacobian, 0.0)
    loc = jacobian * posterior.loc - top
    if isinstance(posterior, LowRank):
        cov_diag = jacobian.square() * posterior.cov_diag + noise
        return LowRank(loc, jacobian[:, None] * posterior.cov_factor, cov_diag), log_prior
    root = torch.cat([reduced.scale.diag(), jacobian[:, None] * posterior.scale_tril], 1)
    return Dense(loc, triangular(root)), log_prior


def shrink(
    posterior: Dense | LowRank, prior: Diagonal, reduced: Diagonal
) -> tuple[float, Dense | LowRank]:
    """Put a Gaussian prior in the place of another, narrower or wider, jointly and in float64.

    -ΔF = ln ∫ q(θ) Π r_i(θ_i) / p_i(θ_i) dθ; ValueError where that posterior is improper.
    """
    return _SHRINK[type(posterior)](posterior, prior, reduced)


def _observation(prior: Diagonal, reduced: Diagonal) -> tuple[Tensor, Tensor, Tensor]:
    """Return J², J² y and the variance of the noise; J² is negative for a wider prior."""
    s0, s_r = prior.scale.square(), reduced.scale.square()
    # A prior that is a point mass stays.
    gain = torch.where(s0 > 0, (s0 - s_r) / s0, 0.0)
    offset = torch.where(s0 > 0, reduced.loc - prior.loc * s_r / s0, 0.0)
    return gain, offset, s_r


def _shrink_dense(posterior: Dense, prior: Diagonal, reduced: Diagonal) -> tuple[float, Dense]:
    delta_f, posterior = _narrow_dense(posterior, prior, reduced, reduced.scale < prior.scale)
    wider = reduced.scale >= prior.scale
    changed = (reduced.scale != prior.scale) | (reduced.loc != prior.loc)
    if not (wider & changed).any():
        return delta_f, posterior
    more, posterior = _widen_dense(posterior, prior, reduced, wider & changed)
    return delta_f + more, posterior


def _narrow_dense(
    posterior: Dense, prior: Diagonal, reduced: Diagonal, narrow: Tensor
) -> tuple[float, Dense]:
    index = narrow.nonzero()[:, 0]
    p, r = (Diagonal(g.loc[index], g.scale[index]) for g in (prior, reduced))
    copy, log_prior = noisy_copy(Dense(posterior.loc[index], posterior.scale_tril[index]), p, r)
    # z and θ jointly, as linear maps of the same noise; what is asked for is θ given that z = 0.
    gain, _, _ = _observation(p, r)
    rows = gain.sqrt()[:, None] * posterior.scale_tril[index]
    root = torch.cat(
        [
            torch.cat([r.scale.diag(), rows], 1),
            torch.cat([torch.zeros_like(rows.mT), posterior.scale_tril], 1),
        ]
    )
    joint = Dense(torch.cat([copy.loc, posterior.loc]), root)
    first = torch.arange(len(root), device=root.device) < len(index)
    gone, rest = joint.split(first)
    return float(delta_f_spike_chain(gone, log_prior).sum()), rest


def _widen_dense(
    posterior: Dense, prior: Diagonal, reduced: Diagonal, wider: Tensor
) -> tuple[float, Dense]:
    # A wider prior lowers the precision: with θ = μ + L x, that of x becomes I + Lᵀ Δ L.
    index = wider.nonzero()[:, 0]
    mean, (p, r) = (
        posterior.loc[index],
        (Diagonal(g.loc[index], g.scale[index]) for g in (prior, reduced)),
    )
    rows = posterior.scale_tril[index]
    change = r.scale.pow(-2) - p.scale.pow(-2)
    slope = (r.loc - mean) / r.scale.square() - (p.loc - mean) / p.scale.square()
    at_mean = (r.scale / p.scale).log() + 0.5 * (
        ((mean - r.loc) / r.scale).square() - ((mean - p.loc) / p.scale).square()
    )
    evidence, shift, factor = _reweigh(rows, change, slope, posterior.scale_tril)
    rest = Dense(posterior.loc + shift, triangular(factor))
    return float(at_mean.sum()) - evidence, rest


def _shrink_low_rank(
    posterior: LowRank, prior: Diagonal, reduced: Diagonal
) -> tuple[float, LowRank]:
    # Given the latent normals x the elements are independent, and each is reduced by itself; its
    # evidence is quadratic in x, with the curvature J² / d_z and the slope -J² (μ − y) / d_z.
    gain, offset, noise = _observation(prior, reduced)
    alone = Diagonal(posterior.loc, posterior.cov_diag.sqrt())
    copied = noise + gain * posterior.cov_diag
    check_proper(copied <= 0)
    weights = posterior.cov_factor
    slope = (offset - gain * posterior.loc) / copied
    ratio = noise / copied
    evidence, shift, factor = _reweigh(weights, gain / copied, slope, weights * ratio[:, None])
    after = reduced_gaussian(alone, prior, reduced)
    delta_f = float(delta_f_gaussian(alone, prior, reduced).sum()) - evidence
    return delta_f, LowRank(after.loc + shift, factor, after.scale.square())


def _reweigh(
    rows: Tensor, curvature: Tensor, slope: Tensor, out: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Weigh standard normals x by exp(Σ slope (rows x) − ½ curvature (rows x)²).

    Return the log of the mean weight, and ``out x`` as a mean and a factor of its covariance.
    """
    identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    tril, failed = torch.linalg.cholesky_ex(identity + rows.mT @ (curvature[:, None] * rows))
    check_proper(failed != 0)
    whitened = torch.linalg.solve_triangular(tril, (rows.mT @ slope)[:, None], upper=False)
    factor = torch.linalg.solve_triangular(tril, out.mT, upper=False).mT
    log_weight = 0.5 * whitened.square().sum() - tril.diagonal().log().sum()
    return float(log_weight), (factor @ whitened)[:, 0], factor


_SHRINK: dict[type, Callable[..., tuple[float, Dense | LowRank]]] = {
    Dense: _shrink_dense,
    LowRank: _shrink_low_rank,
}
