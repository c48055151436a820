"""Which groups to drop: one flip after the other, each the one that lowers the free energy most."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_bmr.mathematics.elimination import mark_path
from pyro_bmr.mathematics.group_evidence import GroupEvidence, GroupWalk

# A change that gains less, in nats, is taken for rounding.
_ROUNDING = 1e-9
# Of so many groups that looked cheapest the couplings are looked at again before each flip.
_LOOK_AGAIN = 64
# Of so many groups all pairs are looked at.
_MOST_IN_PAIRS = 64
# Of so many groups all starts are tried where elements are correlated.
_MOST_STARTS = 512


def search_groups(evidence: GroupEvidence) -> Tensor:
    r"""Drop one group at a time, the cheapest first, then flip in both directions; True goes.

    From three starts, of which the best end counts: what is left by backward elimination, which
    goes on while :math:`\Delta F` falls; all gone; and all gone that is worth it by itself. Where
    more than 512 groups are correlated, only from the first. Groups that share no element and no
    coupling with others decide by themselves. Where no more than 64 do not, pairs are flipped too.
    """
    alone = evidence.alone()
    worth = alone <= 0
    settled = worth & evidence.alone_standing
    open_ = evidence.able & ~evidence.alone_standing
    if not open_.any():
        return settled
    walk = GroupWalk(evidence, settled)
    _eliminate(walk, open_ & ~settled, _ROUNDING)
    starts = [walk.dropped]
    if not evidence.couplings or open_.sum() <= _MOST_STARTS:
        starts += [settled | open_, settled | worth]
    ends = []
    for start in starts:
        walk = GroupWalk(evidence, start)
        _descend(walk, open_)
        while open_.sum() <= _MOST_IN_PAIRS and _flip_pair(walk, open_):
            _descend(walk, open_)
        ends.append(walk.dropped)
    return min(ends, key=evidence.delta_f)


def eliminate_groups(evidence: GroupEvidence) -> Tensor:
    """Remove one group at a time, the cheapest first, given all that went before.

    The prices are as those of `pyro_bmr.mathematics.elimination.eliminate`; groups that share
    nothing with others have their own ΔF.
    """
    alone = evidence.alone()
    open_ = evidence.able & ~evidence.alone_standing
    walk = GroupWalk(evidence, torch.zeros_like(open_))
    order, costs = _eliminate(walk, open_, math.inf)
    return torch.where(open_, mark_path(alone, order, costs), alone)


def take_back(evidence: GroupEvidence, dropped: Tensor, some: Tensor, count: int) -> Tensor:
    """Take back up to ``count`` of the groups at ``some``, those dearest to have dropped."""
    walk = GroupWalk(evidence, dropped)
    for _ in range(min(count, int(dropped[some].sum()))):
        gone = some[walk.dropped[some]]
        walk.look(gone)
        walk.flip(int(gone[walk.changes()[gone].argmin()]))
    return walk.dropped


def _eliminate(walk: GroupWalk, open_: Tensor, limit: float) -> tuple[list[Tensor], list[Tensor]]:
    """Drop open groups, the cheapest first, up to a price; return which, and the changes."""
    order: list[Tensor] = []
    changes: list[Tensor] = []
    open_ = open_.clone()
    while (best := _find_best(walk, open_, limit)) is not None:
        order.append(best)
        changes.append(walk.changes()[best])
        walk.flip(int(best))
        open_[best] = False
    return order, changes


def _descend(walk: GroupWalk, open_: Tensor) -> None:
    """Drop open groups or take them back until none is worth it."""
    while (best := _find_best(walk, open_, -_ROUNDING)) is not None:
        walk.flip(int(best))


def _find_best(walk: GroupWalk, open_: Tensor, limit: float) -> Tensor | None:
    """Find the open group whose flip is cheapest, if any is worth the limit."""
    some = open_.nonzero()[:, 0]
    if walk.remembers:
        price = walk.changes()[some]
        some = some[price.topk(min(_LOOK_AGAIN, len(some)), largest=False).indices]
    for groups in (some, open_.nonzero()[:, 0]):
        walk.look(groups)
        price = walk.changes()[groups]
        if len(price) and price.min() <= min(limit, torch.finfo(price.dtype).max):
            return groups[price.argmin()]
    return None


def _flip_pair(walk: GroupWalk, open_: Tensor) -> bool:
    """Flip the first two groups found that are worth it together, if there are any."""
    everything = open_.nonzero()[:, 0]
    walk.look(everything)
    alone = walk.changes()
    for group in everything[alone[everything].argsort()]:
        if alone[group].isinf():
            break
        walk.flip(int(group))
        walk.look(everything)
        both = alone[group] + walk.changes()[everything]
        if both.min() <= -_ROUNDING:
            walk.flip(int(everything[both.argmin()]))
            return True
        walk.flip(int(group))
    return False
