"""The posterior of a few correlated elements given that any subset of them is zero, in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense, LowRank, triangular

# Of so many elements all subsets are in one block, of 2 MiB where there are 16 in all.
_IN_A_BLOCK = 10


def condition_on_all_subsets(
    posterior: Dense | LowRank,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    r"""Condition on each subset of the elements being zero.

    Yields, for blocks of subsets, their places as in ``delta_f_of_all_subsets``, means
    ``(subsets, n)``, and matrices :math:`R`, ``(subsets, n, n)``, with the covariances
    :math:`R R^\top`; both are 0 at what is dropped. As there, rows are made orthogonal to that of
    the dropped element, which never squares the root.
    """
    root = triangular(posterior.root())
    index = torch.zeros(1, dtype=torch.long, device=root.device)
    yield from _split(index, posterior.loc[None], root[None], len(root))


def _split(
    index: Tensor, loc: Tensor, rows: Tensor, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if count > _IN_A_BLOCK:
        yield from _split(index, loc, rows, count - 1)
        dropped = _condition(loc, rows, count - 1)
        yield from _split(index + (1 << (count - 1)), *dropped, count - 1)
        return
    for i in range(count):
        dropped_loc, dropped_rows = _condition(loc, rows, i)
        index = torch.cat([index, index + (1 << i)])
        loc, rows = torch.cat([loc, dropped_loc]), torch.cat([rows, dropped_rows])
    yield index, loc, rows


def _condition(loc: Tensor, rows: Tensor, i: int) -> tuple[Tensor, Tensor]:
    scale = torch.linalg.vector_norm(rows[:, i], dim=-1, keepdim=True)
    along = rows[:, i] / scale
    overlap = (rows @ along[:, :, None])[..., 0]
    loc = loc - overlap * (loc[:, i : i + 1] / scale)
    rows = rows - overlap[..., None] * along[:, None]
    loc[:, i], rows[:, i] = 0.0, 0.0
    return loc, rows
