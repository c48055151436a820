"""The lowest joint evidence among all subsets of a few groups, in vectorised passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.mathematics.contrast import Contrast, Part, block_costs
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.group_evidence import GroupEvidence
from pyro_bmr.mathematics.group_search import search_groups
from pyro_bmr.mathematics.singular_contrast import SingularContrast
from pyro_bmr.mathematics.subsets import MOST_ELEMENTS, subset_members


def search_best_groups(evidence: GroupEvidence) -> Tensor:
    """Search all sets of groups where that takes a moment, otherwise one flip after the other."""
    groups = int((evidence.able & ~evidence.alone_standing).sum())
    work = sum(_WORK[type(c.posterior)](c.posterior) for c in evidence.couplings)
    few = groups <= MOST_ELEMENTS and work << groups <= _MOST_WORK
    return (search_all_groups if few else search_groups)(evidence)


def search_all_groups(evidence: GroupEvidence) -> Tensor:
    r"""Find the set of groups with the lowest joint :math:`\Delta F` among all :math:`2^n`.

    Groups that share no element and no coupling with others decide by themselves; more than 16
    others are a ValueError.
    """
    dropped = evidence.alone_standing & (evidence.alone() <= 0)
    groups = (evidence.able & ~evidence.alone_standing).nonzero()[:, 0]
    if len(groups) > MOST_ELEMENTS:
        msg = (
            f"got {len(groups)} groups, which have 2^{len(groups)} subsets. Expected at most "
            f"{MOST_ELEMENTS}: search by pyro_bmr.by_evidence, or name fewer sites"
        )
        raise ValueError(msg)
    if len(groups):
        dropped[groups] = _best_subset(evidence, groups)
    return dropped


# Multiplications up to which all sets are looked at unasked: about half a second.
_MOST_WORK = 1 << 28
# Numbers in the matrices of a pass.
_PASS = 1 << 23


def _best_subset(evidence: GroupEvidence, groups: Tensor) -> Tensor:
    # Elements that are in the same groups go together: as bits, the groups of each such pattern.
    bits = torch.zeros_like(evidence.able, dtype=torch.long)
    bits[groups] = 1 << torch.arange(len(groups), device=groups.device)
    patterns, which = evidence.members.element_sums(bits).unique(return_inverse=True)
    cost = torch.zeros_like(patterns, dtype=torch.float64).index_add_(0, which, evidence.cost)
    size = max(
        [len(patterns), *(_SIZE[type(c.posterior)](c.posterior) for c in evidence.couplings)]
    )
    index = torch.arange(1 << len(groups), device=groups.device)
    parts = []
    for some in index.split(max(1, _PASS // size)):
        hit = (some[:, None] & patterns) != 0
        total = hit.double() @ cost
        for coupling in evidence.couplings:
            gone = hit[:, which[coupling.element]]
            total = total + _JOINT[type(coupling.posterior)](coupling.posterior, gone)
        parts.append(torch.where(total.isnan(), torch.inf, total))
    return subset_members(torch.cat(parts).argmin(), len(groups))


def _dense(posterior: Dense, gone: Tensor) -> Tensor:
    # An element that stays is replaced by an independent one that adds nothing.
    both = gone[:, :, None] & gone[:, None, :]
    kept = (~gone).to(posterior.loc).diag_embed()
    tril, failed = torch.linalg.cholesky_ex(posterior.covariance * both + kept)
    return _log_normalizer(tril, failed, posterior.loc * gone, 1.0)


def _low_rank(posterior: LowRank, gone: Tensor) -> Tensor:
    mask = gone.to(posterior.loc)
    factor, diagonal = posterior.cov_factor, posterior.cov_diag
    own = 0.5 * (diagonal.log() + posterior.loc.square() / diagonal)
    weighted = mask[:, :, None] * (factor / diagonal[:, None])
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    tril, failed = torch.linalg.cholesky_ex(identity + weighted.mT @ factor)
    linear = (weighted * posterior.loc[:, None]).sum(1)
    return mask @ own + _log_normalizer(tril, failed, linear, -1.0)


def _log_normalizer(tril: Tensor, failed: Tensor, vector: Tensor, sign: float) -> Tensor:
    whitened = torch.linalg.solve_triangular(tril, vector[..., None], upper=False)[..., 0]
    log_determinant = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = log_determinant + sign * 0.5 * whitened.square().sum(-1)
    return torch.where(failed == 0, value, torch.inf)


def _contrast(contrast: Contrast, gone: Tensor) -> Tensor:
    parts = (_part(part, gone) for part in contrast.parts)
    return torch.stack(list(parts)).sum(0)


def _part(part: Part, gone: Tensor) -> Tensor:
    rows = len(part.edge) // max(1, gone.shape[-1])
    count = gone.sum(-1) * (rows - 1)
    gone = gone.repeat(1, rows)
    kept = (~gone).to(part.edge).diag_embed()
    matrix = part.matrix * gone[:, :, None] * gone[:, None, :] + kept
    return part.sign * block_costs(matrix, part.edge * gone, count)


_JOINT: dict[type, Callable[..., Tensor]] = {
    Dense: _dense,
    LowRank: _low_rank,
    Contrast: _contrast,
    SingularContrast: SingularContrast.of_sets,
}
_SIZE: dict[type, Callable[..., int]] = {
    Dense: lambda posterior: len(posterior.loc) ** 2,
    LowRank: lambda posterior: posterior.cov_factor.numel(),
    Contrast: lambda contrast: len(contrast.parts[0].edge) ** 2,
    SingularContrast: lambda contrast: contrast.size**2,
}
_WORK: dict[type, Callable[..., int]] = {
    Dense: lambda posterior: len(posterior.loc) ** 3,
    Contrast: lambda contrast: len(contrast.parts[0].edge) ** 3,
    SingularContrast: lambda contrast: 10 * contrast.size**3,
    LowRank: lambda posterior: posterior.cov_factor.numel() * posterior.cov_factor.shape[-1],
}
