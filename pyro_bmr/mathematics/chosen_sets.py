r"""Many given sets of a correlated posterior: ΔF of dropping each, and what is left of the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.contrast import Contrast, Part
from pyro_bmr.mathematics.evidence import Correlated, delta_f_spike_chain
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, LowRank
from pyro_bmr.mathematics.singular_contrast import SingularContrast


def drop_sets(posterior: Correlated, log_prior: Tensor, drop: Tensor) -> ReducedMoments:
    r"""Drop each of a batch of sets from a posterior in float64.

    With :math:`T` and :math:`t` of each part (of a Gaussian, its covariance and mean; see
    `pyro_bmr.mathematics.contrast`), :math:`\Delta F_S = \sum_{i \in S} [\ln p(\theta_i = 0) +
    \tfrac12 \ln 2\pi] \pm \tfrac12 (\ln |\det T_{SS}| + t_S^\top T_{SS}^{-1} t_S)`, and the rest
    has the mean :math:`t_R - T_{RS} T_{SS}^{-1} t_S` and the covariance
    :math:`T_{RR} - T_{RS} T_{SS}^{-1} T_{SR}`. ``drop`` is boolean, ``(sets, n)``.
    """  # noqa: DOC201
    return _DROP[type(posterior)](posterior, log_prior, drop)


@dataclass(frozen=True)
class ReducedMoments:
    """ΔF of each set in nats, ``(sets,)``; mean and variance of the rest, ``(sets, n)``.

    What is dropped has zeros, and so has everything where ΔF is ``inf``.
    """

    delta_f: Tensor
    loc: Tensor
    variance: Tensor


# Numbers in the matrices of a batch.
_BATCH = 1 << 22


def _drop_dense(posterior: Dense, log_prior: Tensor, drop: Tensor) -> ReducedMoments:
    root = posterior.root()
    part = Part(root @ root.mT, posterior.loc)
    return _drop_contrast(Contrast((part,), len(posterior.loc)), log_prior, drop)


def _drop_contrast(contrast: Contrast, log_prior: Tensor, drop: Tensor) -> ReducedMoments:
    """Solve for sets of about the same size together."""
    delta_f = _without_h(log_prior, drop)
    loc, variance = drop.to(contrast.loc), drop.to(contrast.loc)
    count = drop.sum(1)
    order = count.argsort()
    for some in _split_sizes(order, count[order], contrast.size):
        mine = drop[some]
        index = mine.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        index = index[:, : max(1, int(count[some].max()))]
        inside = mine.gather(1, index)
        for part in contrast.parts:
            delta_f[some] += part.sign * _Solved(part, index, inside, contrast.size).cost
        own = _Solved(contrast.parts[0], index, inside, contrast.size)
        loc[some], variance[some] = own.rest()
    return ReducedMoments(delta_f, loc.where(~drop, 0.0), variance.clamp_min(0).where(~drop, 0.0))


def _split_sizes(order: Tensor, count: Tensor, size: int) -> list[Tensor]:
    """Split sets, in the order of their sizes, so that each batch fits into memory."""
    parts, start, counts = [], 0, count.tolist()
    while start < len(counts):
        stop, largest = start + 1, max(1, 2 * counts[start])
        while (
            stop < len(counts)
            and counts[stop] <= largest
            and (stop + 1 - start) * 2 * counts[stop] * (2 * counts[stop] + size) <= _BATCH
        ):
            stop += 1
        parts.append(order[start:stop])
        start = stop
    return parts


class _Solved:
    """A part of a contrast, of which the rows ``index`` of each set go, as far as ``inside``."""

    def __init__(self, part: Part, index: Tensor, inside: Tensor, size: int) -> None:
        blocks = len(part.edge) // size
        rows = torch.cat([index + size * i for i in range(blocks)], 1)
        self.inside = inside.repeat(1, blocks)
        self.part, self.size = part, size
        self.first = len(part.edge) - size
        both = self.inside[:, :, None] & self.inside[:, None, :]
        outside = (~self.inside).to(part.edge).diag_embed()
        matrix = torch.where(both, part.matrix[rows[:, :, None], rows[:, None, :]], 0) + outside
        self.across = torch.where(self.inside[:, :, None], part.matrix[rows][:, :, self.first :], 0)
        edge = torch.where(self.inside, part.edge[rows], 0)
        columns = torch.cat([self.across, edge[:, :, None]], -1)
        factors, pivots = torch.linalg.lu_factor(matrix)
        self.gain = torch.linalg.lu_solve(factors, pivots, columns)
        log_det = factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        self.cost = 0.5 * (log_det + (edge * self.gain[:, :, -1]).sum(-1))

    def rest(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of what is left."""
        loc = self.part.edge[self.first :] - (self.across * self.gain[:, :, -1:]).sum(1)
        own = self.part.matrix.diagonal()[self.first :]
        return loc, own - (self.across * self.gain[:, :, :-1]).sum(1)


def _drop_low_rank(posterior: LowRank, log_prior: Tensor, drop: Tensor) -> ReducedMoments:
    parts = [posterior.split(one) for one in drop]
    chains = zip(parts, drop, strict=True)
    delta_f = torch.stack([delta_f_spike_chain(p[0], log_prior[d]).sum() for p, d in chains])
    return _scatter(delta_f, [rest for _, rest in parts], drop)


def _drop_singular(contrast: SingularContrast, log_prior: Tensor, drop: Tensor) -> ReducedMoments:
    delta_f = _without_h(log_prior, drop) + contrast.of_sets(drop)
    possible = delta_f.isfinite()
    rest = [contrast.split(one)[1] for one in drop[possible]]
    found = _scatter(delta_f[possible], rest, drop[possible])
    loc, variance = (torch.zeros_like(drop, dtype=contrast.loc.dtype) for _ in range(2))
    loc[possible], variance[possible] = found.loc, found.variance
    return ReducedMoments(delta_f, loc, variance)


def _without_h(log_prior: Tensor, drop: Tensor) -> Tensor:
    return torch.where(drop, log_prior + 0.5 * LOG_2PI, 0).sum(1)


def _scatter(delta_f: Tensor, rest: Sequence[Correlated], drop: Tensor) -> ReducedMoments:
    loc, variance = (torch.zeros_like(drop, dtype=delta_f.dtype) for _ in range(2))
    for i, one in enumerate(rest):
        marginal = one.marginals()
        loc[i, ~drop[i]] = marginal.loc
        variance[i, ~drop[i]] = marginal.scale.square()
    return ReducedMoments(delta_f, loc, variance)


_DROP: dict[type, Callable[..., ReducedMoments]] = {
    Dense: _drop_dense,
    Contrast: _drop_contrast,
    LowRank: _drop_low_rank,
    SingularContrast: _drop_singular,
}
