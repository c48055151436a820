r"""A tableau of a correlated Gaussian, from which the price of every change of a subset is read.

Of the matrix of :math:`\Sigma` with :math:`\mu` at its edge, swept on the elements :math:`S` that
are dropped, the rows of those kept hold their covariance and mean given :math:`\theta_S = 0`, and
the rows of those dropped the negative precision of their marginal, and precision times mean. A
sweep drops an element, or takes it back, in :math:`O(n^2)`. Elements of a part of a
`pyro_bmr.mathematics.contrast.Contrast` may have two rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bmr.mathematics.contrast import block_costs, element_blocks
from pyro_bmr.mathematics.gaussian import Dense

# Where elements have two rows, pairs are looked at among so many, those that are cheapest to flip.
_MOST_IN_PAIRS = 64


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


def tableau_of_part(matrix: Tensor, edge: Tensor, dropped: Tensor) -> Tensor:
    """Make the tableau of a subset from that of the empty one."""
    bordered = torch.cat([matrix, edge[:, None]], -1)
    tableau = torch.cat([bordered, torch.cat([edge, edge.new_zeros(1)])[None]])
    out = dropped.nonzero()[:, 0]
    if len(out) and not sweep(tableau, dropped, out, True):
        tableau.fill_(torch.nan)  # so that nothing is worth a step from here
    return tableau


def sweep(tableau: Tensor, dropped: Tensor, elements: Tensor, drop: bool) -> bool:
    """Drop elements, or take them back, in place; False if rounding has left nothing to go by."""
    rows = _rows(tableau, dropped, elements)
    sign = 1.0 if drop else -1.0
    columns = tableau[:, rows]
    block = columns[rows]
    if not bool(_is_sound(block, len(elements), sign)):
        return False
    inverse = torch.linalg.inv(block)
    gain = inverse @ columns.mT
    tableau.addmm_(columns, gain, alpha=-1.0)
    tableau[rows] = sign * gain
    tableau[:, rows] = sign * gain.mT
    tableau[rows[:, None], rows] = -(inverse + inverse.mT) / 2
    return True


def step_costs(tableau: Tensor, dropped: Tensor, sets: Tensor, drop: bool) -> Tensor:
    """Tell what each of a batch of sets, ``(batch, elements)``, would change; see `flips`."""
    rows = _rows(tableau, dropped, sets)
    blocks = tableau[rows[:, :, None], rows[:, None, :]]
    sign, count = 1.0 if drop else -1.0, sets.shape[-1]
    sound = _is_sound(blocks, count, sign)
    negative = 0 if drop and blocks.shape[-1] == count else count
    return torch.where(sound, block_costs(blocks, tableau[rows, -1], negative), torch.inf)


def flips(tableau: Tensor, dropped: Tensor) -> Tensor:
    r"""Tell by how much flipping each element changes the part of h that the tableau stands for.

    :math:`\tfrac12 (\ln |\det T| + t^\top T^{-1} t)` of its rows; ``inf`` where rounding has left
    nothing to go by.
    """
    blocks, edges = element_blocks(tableau[:-1, :-1], tableau[:-1, -1], len(dropped))
    sound = _is_sound(blocks * torch.where(dropped, -1.0, 1.0)[:, None, None], 1, 1.0)
    return torch.where(sound, block_costs(blocks, edges), torch.inf)


def pair_flips(tableau: Tensor, dropped: Tensor) -> Tensor:
    """Tell the same of flipping two elements; ``inf`` on the diagonal."""
    alone = flips(tableau, dropped)
    single = len(tableau) - 1 == len(dropped)
    pairs = _pairs_of_rows(tableau) if single else _pairs_of_blocks(tableau, dropped, alone)
    sound = alone.isfinite()
    pairs = torch.where(sound[:, None] & sound & pairs.isfinite(), pairs, torch.inf)
    return pairs.fill_diagonal_(torch.inf)


def _pairs_of_rows(tableau: Tensor) -> Tensor:
    pivot, edge = tableau.diagonal()[:-1], tableau[:-1, -1]
    covariance = tableau[:-1, :-1]
    product = torch.outer(pivot, pivot)
    determinant = product - covariance.square()
    quadratic = torch.outer(edge.square(), pivot) - covariance * torch.outer(edge, edge)
    quadratic = (quadratic + quadratic.mT) / determinant
    pairs = 0.5 * (determinant.abs().log() + quadratic)
    # Rounding may have cost a nearly singular pair its sign.
    return torch.where(determinant * product > 0, pairs, torch.inf)


def _pairs_of_blocks(tableau: Tensor, dropped: Tensor, alone: Tensor) -> Tensor:
    cheap = alone.topk(min(_MOST_IN_PAIRS, len(alone)), largest=False).indices
    pairs = torch.combinations(cheap)
    rows = _rows(tableau, dropped, pairs)
    blocks = tableau[rows[:, :, None], rows[:, None, :]]
    costs = block_costs(blocks, tableau[rows, -1], 2)
    change = torch.full_like(tableau[:-1, :-1][: len(alone), : len(alone)], torch.inf)
    change[pairs[:, 0], pairs[:, 1]] = change[pairs[:, 1], pairs[:, 0]] = costs
    return change


def _rows(tableau: Tensor, dropped: Tensor, elements: Tensor) -> Tensor:
    """Return the rows of elements, along the last dimension."""
    firsts = range(0, len(tableau) - 1, max(1, len(dropped)))
    return torch.cat([elements + first for first in firsts], -1)


def _is_sound(blocks: Tensor, count: int, sign: float) -> Tensor:
    """Tell whether blocks of ``count`` elements are definite, or of two rows have that sign."""
    if blocks.shape[-1] == count:
        return torch.linalg.cholesky_ex(sign * blocks).info == 0
    return (torch.linalg.eigvalsh(blocks) < 0).sum(-1) == count


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
