"""The posterior that a reduced prior would have led to, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import Distribution, Independent, Normal

from pyro_bmr.mathematics.conjugate import CONJUGATE, build, reduced_parameters
from pyro_bmr.mathematics.gaussian import Dense, Diagonal
from pyro_bmr.mathematics.triples import Family, check_proper, common_kind, dtype_of


def reduced_posterior(posterior: Family, prior: Family, reduced: Family) -> Family:
    r"""Return the posterior that a reduced prior would have led to.

    .. math:: q_r(\theta) \propto q(\theta) \, r(\theta) / p(\theta)

    Parameters
    ----------
    posterior, prior, reduced : Diagonal, Dense or Distribution
        As for `delta_f`.

    Returns
    -------
    Diagonal, Dense or Distribution
        Of the same family, in the posterior's dtype.

    Raises
    ------
    ValueError
        If it cannot be normalised, or the three do not go together, as for `delta_f`.

    References
    ----------
    Friston, Parr & Zeidman (2018), arXiv:1805.07092.

    Examples
    --------
    >>> reduced_posterior(dist.Gamma(5.0, 3.0), dist.Gamma(1.0, 1.0), dist.Gamma(2.0, 4.0))
    Gamma(concentration: 6.0, rate: 6.0)
    """
    kind = common_kind(_REDUCE, posterior, prior, reduced)
    return _REDUCE[kind](posterior, prior, reduced)


def reduced_gaussian(posterior: Diagonal, prior: Diagonal, reduced: Diagonal) -> Diagonal:
    r"""Return q·r/p of every element by itself, in float64; NaN where it is improper.

    .. math:: \sigma^2 = s_r / M, \quad \mu = (m_r + s_r h) / M, \quad
              M = 1 + s_r (1/s - 1/s_0), \quad h = \mu / s - \mu_0 / s_0
    """  # noqa: DOC201
    s, s0, s_r = (g.scale.double().square() for g in (posterior, prior, reduced))
    m = 1 + s_r * (s0 - s) / (s * s0)
    m = torch.where(m > 0, m, torch.nan)
    h = posterior.loc.double() / s - prior.loc.double() / s0
    return Diagonal((reduced.loc.double() + s_r * h) / m, (s_r / m).sqrt())


def _reduce_diagonal(posterior: Diagonal, prior: Diagonal, reduced: Diagonal) -> Diagonal:
    after = reduced_gaussian(posterior, prior, reduced)
    check_proper(after.scale.isnan())
    dtype = posterior.loc.dtype
    return Diagonal(after.loc.to(dtype), after.scale.to(dtype))


def _reduce_dense(posterior: Dense, prior: Dense, reduced: Dense) -> Dense:
    q, p, r = (g.natural() for g in (posterior, prior, reduced))
    after = q + r - p
    tril, failed = torch.linalg.cholesky_ex(after.precision)
    check_proper(failed != 0)
    loc = torch.cholesky_solve(after.linear[:, None], tril)[:, 0]
    scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(tril))
    return Dense(loc, scale_tril).to(posterior.loc.dtype)


def _reduce_normal(*three: Normal) -> Normal:
    after = _reduce_diagonal(*(Diagonal(fn.loc, fn.scale) for fn in three))
    return dist.Normal(after.loc, after.scale)


def _reduce_independent(*three: Independent) -> Independent:
    posterior, prior, reduced = (fn.base_dist for fn in three)
    kind = common_kind(_REDUCE, posterior, prior, reduced)
    inner = _REDUCE[kind](posterior, prior, reduced)
    return dist.Independent(inner, three[0].reinterpreted_batch_ndims)


def _reduce_conjugate(
    kind: type[Distribution], posterior: Distribution, prior: Distribution, reduced: Distribution
) -> Distribution:
    family = CONJUGATE[kind]
    parameters = reduced_parameters(family, posterior, prior, reduced)
    check_proper(parameters.isnan().any(-1))
    return build(family, parameters, dtype_of(posterior))


_REDUCE: dict[type, Callable[..., Any]] = {
    Diagonal: _reduce_diagonal,
    Dense: _reduce_dense,
    Normal: _reduce_normal,
    Independent: _reduce_independent,
    **{kind: partial(_reduce_conjugate, kind) for kind in CONJUGATE},
}
