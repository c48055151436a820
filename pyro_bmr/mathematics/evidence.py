r"""How a smaller prior changes the variational free energy, in closed form.

The one sign of this package: :math:`\Delta F` is the free energy of the reduced model minus that
of the full model, in nats. Negative is better; prune where ``delta_f <= 0``. The log evidence
ratio of Friston and of SPM is ``-delta_f``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_bmr.mathematics.conjugate import CONJUGATE, delta_f_conjugate
from pyro_bmr.mathematics.contrast import Contrast
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, Diagonal, LowRank
from pyro_bmr.mathematics.singular_contrast import SingularContrast
from pyro_bmr.mathematics.sweep import sweep
from pyro_bmr.mathematics.triples import Family, check_proper, common_kind, dtype_of

Correlated = Dense | LowRank | Contrast | SingularContrast


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def delta_f(posterior: Family, prior: Family, reduced: Family) -> Tensor:
    r"""Score a reduced prior by the free energy that it would have led to.

    .. math:: -\Delta F = \ln \mathbb{E}_q[r / p] = A(q + r - p) - A(q) - A(r) + A(p)

    in natural parameters, with :math:`A` their log-partition.

    Parameters
    ----------
    posterior : Diagonal, Dense or Distribution
        The posterior :math:`q` under the full prior. A distribution of torch or Pyro may be a
        ``Normal``, ``Gamma``, ``Beta`` or ``Dirichlet``, also in ``to_event``. The rows of a table
        of Dirichlets, as for a Categorical with conditions, are a batch of them.
    prior : Diagonal, Dense or Distribution
        The prior :math:`p`, of the same family and shape; a distribution may broadcast.
    reduced : Diagonal, Dense or Distribution
        The reduced prior :math:`r`, of the same family and shape. A scale of zero is a point
        mass and exact for `Diagonal`.

    Returns
    -------
    Tensor
        :math:`\Delta F` in nats, in the posterior's dtype: one per element for `Diagonal`, a
        scalar for `Dense`, of the batch shape for a distribution.

    Raises
    ------
    ValueError
        If the reduced posterior :math:`q r / p` cannot be normalised, the three do not go
        together, or the ``scale_tril`` of a `Dense` is not lower triangular with a positive
        diagonal.

    References
    ----------
    Friston, Parr & Zeidman (2018), "Bayesian model reduction", arXiv:1805.07092, eq. 10; Beckers
    et al. (2022), arXiv:2210.09134.

    Examples
    --------
    >>> one = torch.tensor(1.0)
    >>> delta_f(Diagonal(0.1 * one, 0.5 * one), Diagonal(0 * one, one), Diagonal(0 * one, 0 * one))
    tensor(-0.6731)
    >>> import pyro.distributions as dist
    >>> delta_f(dist.Beta(3.0, 1.0), dist.Beta(1.0, 1.0), dist.Beta(1.0, 2.0))
    tensor(0.6931)
    """
    kind = common_kind(_DELTA_F, posterior, prior, reduced)
    value = _DELTA_F[kind](posterior, prior, reduced)
    check_proper(value.isnan())
    return value.to(dtype_of(posterior))


def delta_f_gaussian(posterior: Diagonal, prior: Diagonal, reduced: Diagonal) -> Tensor:
    """Score a Gaussian reduced prior element by element; ``inf`` where q·r/p is improper."""
    value = _delta_f_diagonal(posterior, prior, reduced)
    return torch.where(value.isnan(), torch.inf, value)


def delta_f_released(posterior: Diagonal, prior: Diagonal, log_prior: Tensor) -> Tensor:
    r"""Score every element that nothing depends on any more, in nats and float64.

    :math:`\Delta F_i = -KL(q_i \,\|\, p_i)`: the likelihood is then the same whatever its value is,
    so that its posterior is its prior. A hierarchical prior enters by its expected natural
    parameters and its expected ln p(θ = 0).
    """  # noqa: DOC201
    loc, variance = posterior.loc.double(), posterior.scale.double().square()
    precision = prior.scale.double().square().reciprocal()
    # E[ln p] = ln p(0) + E[λ μ₀] θ - E[λ] θ² / 2, averaged over θ.
    linear = precision * prior.loc.double()
    expected = log_prior.double() + linear * loc - 0.5 * precision * (variance + loc.square())
    return expected + 0.5 * (1 + LOG_2PI + variance.log())


def delta_f_spike(
    posterior: Diagonal, log_prior: Tensor, scale_transform: Callable[[Tensor], Tensor] = _identity
) -> Tensor:
    r"""Score the removal of every element by itself, in nats and the posterior's dtype.

    :math:`\Delta F_i = \ln p(\theta_i = 0) - \ln q(\theta_i = 0)`, in float64, since nearly equal
    densities cancel; ``inf`` where ``log_prior`` is. ``scale_transform`` leads from
    ``posterior.scale``, a part at a time, to standard deviations. Source: Dickey (1971), Ann. Math.
    Statist. 42(1); the limit of eq. 10 in Friston, Parr & Zeidman (2018), arXiv:1805.07092, as the
    reduced variance goes to zero.
    """  # noqa: DOC201
    scores = torch.empty_like(posterior.loc, memory_format=torch.contiguous_format)
    constant = log_prior.to(posterior.loc.device, torch.float64) + 0.5 * LOG_2PI
    tensors = (posterior.loc, posterior.scale, constant, scores)
    sweep(_write_spike, *tensors, context=scale_transform)
    return scores


def delta_f_spikes(posterior: Correlated, log_prior: Tensor) -> Tensor:
    """Score the removal of every element by itself, where a joint prior may have its say."""
    if isinstance(posterior, Dense | LowRank):
        return delta_f_spike(posterior.marginals(), log_prior)
    return log_prior + 0.5 * LOG_2PI + posterior.alone()


def delta_f_spike_chain(posterior: Correlated, log_prior: Tensor) -> Tensor:
    r"""Split the joint removal of correlated elements into one term each, in their order.

    :math:`\ln p(\theta_i = 0) - \ln q(\theta_i = 0 \mid \theta_1 = \dots = \theta_{i-1} = 0)`, in
    nats, which add up to the joint ΔF. ``posterior`` is the **marginal** of what goes. Under a
    joint prior, ``log_prior`` is that of the standard normals that this takes the place of.
    """  # noqa: DOC201
    return _CHAIN[type(posterior)](posterior, log_prior)


def delta_f_of_set(posterior: Correlated, log_prior: Tensor, drop: Tensor) -> Tensor:
    """Score the joint removal of a set of correlated elements, a scalar in nats."""
    if isinstance(posterior, Dense | LowRank):
        return delta_f_spike_chain(posterior.split(drop)[0], log_prior[drop]).sum()
    return (log_prior[drop] + 0.5 * LOG_2PI).sum() + posterior.of_set(drop)


def total_dropped(scores: Tensor, mask: Tensor) -> float:
    """Add up the scores of what a mask drops, in float64 whatever their dtype."""
    return float(sum_dropped(scores, mask))


def sum_dropped(scores: Tensor, mask: Tensor) -> Tensor:
    """Do the same as `total_dropped`, and leave the sum where it is."""
    # As bytes, a mask is many times faster to compute with than as booleans.
    parts = sweep(_sum_dropped, scores, mask.view(torch.uint8))
    return torch.stack(parts).sum()


def _write_spike(
    scale_transform: Callable[[Tensor], Tensor],
    loc: Tensor,
    scale: Tensor,
    constant: Tensor,
    scores: Tensor,
) -> None:
    log_scale = scale_transform(scale).to(torch.float64, copy=True)
    whitened = loc.to(torch.float64, copy=True).div_(log_scale)
    scores.copy_(log_scale.log_().addcmul_(whitened, whitened, value=0.5).add_(constant))


def _sum_dropped(_: None, scores: Tensor, kept: Tensor) -> Tensor:
    # An element that cannot go has the score inf, and inf · 0 would not be 0.
    finite = scores.clamp(max=torch.finfo(scores.dtype).max)
    return (finite * (1 - kept)).sum(dtype=torch.float64)


def _delta_f_diagonal(posterior: Diagonal, prior: Diagonal, reduced: Diagonal) -> Tensor:
    # With variances s, s0, s_r of q, p, r, and both means measured from the reduced one,
    # a = μ − m_r and b = μ0 − m_r, Friston et al.'s quadratic form is
    #     a²/s − b²/s0 − s_r (a/s − b/s0)² / M,    M = 1 + s_r (1/s − 1/s0).
    # Its large terms cancel when s is small. Put over M, they cancel on paper instead:
    #     [a²/s − b²/s0 − s_r (a − b)² / (s s0)] / M,
    # which needs no 1/s_r, so that s_r = 0 is exact, and is 0 to the last digit for r = p.
    s, s0, s_r = (g.scale.double().square() for g in (posterior, prior, reduced))
    a = posterior.loc.double() - reduced.loc.double()
    b = prior.loc.double() - reduced.loc.double()
    m = 1 + s_r * (s0 - s) / (s * s0)
    m = torch.where(m > 0, m, torch.nan)
    quadratic = (a * a / s - b * b / s0 - s_r * (a - b).square() / (s * s0)) / m
    return 0.5 * (quadratic - s0.log() + s.log() + m.log())


def _delta_f_dense(posterior: Dense, prior: Dense, reduced: Dense) -> Tensor:
    # ΔF does not depend on where zero lies; measured from the reduced mean, its terms are smallest.
    q, p, r = (
        Dense(g.loc - reduced.loc, g.scale_tril).natural() for g in (posterior, prior, reduced)
    )
    return q.log_partition() + r.log_partition() - p.log_partition() - (q + r - p).log_partition()


def _chain_dense(posterior: Dense, log_prior: Tensor) -> Tensor:
    tril = posterior.scale_tril
    whitened = torch.linalg.solve_triangular(tril, posterior.loc[:, None], upper=False)[:, 0]
    return log_prior + 0.5 * LOG_2PI + tril.diagonal().log() + 0.5 * whitened.square()


def _chain_contrast(contrast: Contrast | SingularContrast, log_prior: Tensor) -> Tensor:
    return log_prior + 0.5 * LOG_2PI + contrast.chain()


# Elements that are conditioned on together: a matrix of so many columns fits into the cache.
_CHAIN_BLOCK = 128


def _chain_low_rank(posterior: LowRank, log_prior: Tensor) -> Tensor:
    # Given a block and all before it, the latent normals z have the precision
    # I + Σ w wᵀ / d and the mean V Σ -w μ / d: a block at a time, O(n k²) in all.
    rank = posterior.cov_factor.shape[-1]
    precision = torch.eye(rank, dtype=posterior.loc.dtype, device=posterior.loc.device)
    linear = torch.zeros_like(precision[0])
    parts = [log_prior[:0]]
    for index in torch.arange(len(log_prior), device=log_prior.device).split(_CHAIN_BLOCK):
        block = posterior.select(index)
        tril = torch.linalg.cholesky(precision)
        factor = torch.linalg.solve_triangular(tril, block.cov_factor.mT, upper=False).mT
        shift = torch.cholesky_solve(linear[:, None], tril)[:, 0]
        given = LowRank(block.loc + block.cov_factor @ shift, factor, block.cov_diag)
        parts.append(delta_f_spike_chain(given.dense(), log_prior[index]))
        weighted = block.cov_factor / block.cov_diag[:, None]
        precision = precision + block.cov_factor.mT @ weighted
        linear = linear - weighted.mT @ block.loc
    return torch.cat(parts)


def _delta_f_normal(*three: Normal) -> Tensor:
    return _delta_f_diagonal(*(Diagonal(fn.loc, fn.scale) for fn in three))


def _delta_f_independent(*three: Independent) -> Tensor:
    posterior, prior, reduced = (fn.base_dist for fn in three)
    kind = common_kind(_DELTA_F, posterior, prior, reduced)
    value = _DELTA_F[kind](posterior, prior, reduced)
    dims = three[0].reinterpreted_batch_ndims
    return value.sum(tuple(range(-dims, 0))) if dims else value


_DELTA_F: dict[type, Callable[..., Tensor]] = {
    Diagonal: _delta_f_diagonal,
    Dense: _delta_f_dense,
    Normal: _delta_f_normal,
    Independent: _delta_f_independent,
    **{kind: partial(delta_f_conjugate, family) for kind, family in CONJUGATE.items()},
}
_CHAIN: dict[type, Callable[..., Tensor]] = {
    Dense: _chain_dense,
    LowRank: _chain_low_rank,
    Contrast: _chain_contrast,
    SingularContrast: _chain_contrast,
}
