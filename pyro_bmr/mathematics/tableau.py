r"""A tableau of a correlated Gaussian, from which the price of every change of a subset is read.

Of the matrix of :math:`\Sigma` with :math:`\mu` at its edge, swept on the elements :math:`S` that
are dropped, the rows of those kept hold their covariance and mean given :math:`\theta_S = 0`, and
the rows of those dropped the negative precision of their marginal, and precision times mean. A
sweep drops an element, or takes it back, in :math:`O(n^2)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense


def make_tableau(posterior: Dense, dropped: Tensor) -> Tensor:
    """Make the tableau of a subset, ``(n + 1, n + 1)``, without squaring the covariance's root.

    Source: Goodnight (1979), "A tutorial on the SWEEP operator", The American Statistician 33(3).
    """
    count, out, left = len(dropped), dropped.nonzero()[:, 0], (~dropped).nonzero()[:, 0]
    size = len(out)
    tril = posterior.ordered(torch.cat([out, left]))
    edge = tril[size:, :size]
    gain = torch.linalg.solve_triangular(tril[:size, :size], edge, upper=False, left=False)
    precision = torch.cholesky_inverse(tril[:size, :size])
    linear = precision @ posterior.loc[out]
    tableau = posterior.loc.new_zeros(count + 1, count + 1)
    tableau[out[:, None], out] = -precision
    tableau[left[:, None], out] = gain
    tableau[out[:, None], left] = gain.mT
    tableau[left[:, None], left] = tril[size:, size:] @ tril[size:, size:].mT
    tableau[out, count] = tableau[count, out] = linear
    tableau[left, count] = tableau[count, left] = posterior.loc[left] - edge @ (
        tril[:size, :size].mT @ linear
    )
    return tableau


def sweep_tableau(tableau: Tensor, index: Tensor) -> None:
    """Drop, or take back, the element ``index`` of each tableau of a batch, in place."""
    batch = torch.arange(len(index), device=index.device)
    column = tableau[batch, index].clone()
    pivot = column[batch, index].clone()
    tableau.baddbmm_((column / pivot[:, None])[:, :, None], column[:, None, :], alpha=-1.0)
    edge = column / pivot.abs()[:, None]
    edge[batch, index] = -1 / pivot
    tableau[batch, index] = edge
    tableau[batch, :, index] = edge
