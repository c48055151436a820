"""What a reduction did to F, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.estimators.parts_of_rows import BLOCK
from pyro_bmr.programs.ranks import ONE, Ranks
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.selection.decision import Decision

# Rows that are measured at once, of more.
ROWS = 2_000
_DRAWS = 16


@dataclass(frozen=True)
class Realised:
    """ΔF in nats as measured: by site in the order of the decision, in total, and its error."""

    by_site: Mapping[str, float]
    total: float
    error: float


def make_meter(decision: Decision, batch_size: int, seed: int, ranks: Ranks = ONE) -> Meter:
    """Make a meter for what a decision leads to; ValueError if the model cannot be measured.

    One that the decision has is of the ``ranks`` that the new one is of.
    """
    meter = decision.meter
    if meter is not None:
        if meter.batch_size == batch_size:
            return meter.again(seed)
        ranks = meter.ranks
    origin = decision.origin
    pair = decision.assemble()[:2]
    with explained_refusals(*pair, origin.args, origin.kwargs):
        return Meter(pair, origin.args, origin.kwargs, batch_size, seed, origin.stream, ranks)


def measure_realised(decision: Decision, meter: Meter) -> Realised:
    """Measure ΔF, with all rows at least once, and as many draws however it comes out.

    What lies between is measured with fewer, and what that leaves of the total goes to the sites in
    proportion to their own parts.
    """
    names = decision.changed()
    if not names:
        return Realised({}, 0.0, 0.0)
    draws = _whole_blocks(max(_DRAWS, meter.parts))
    few = draws if meter.parts == 1 else _whole_blocks(max(_DRAWS / 2, meter.parts / 4))

    def measure(sites: tuple[str, ...], count: int) -> Tensor:
        step = decision.restrict(sites)
        return meter.measure(step.assemble()[:2], 0, count, step.couplings())

    first, last = measure((), draws), measure(names, draws)
    between = [measure(names[:i], few) for i in range(1, len(names))]
    steps = [first[:few], *between, last[:few]]
    parts = torch.stack([(b - a).mean() for a, b in pairwise(steps)])
    total, error = mean_and_error(last - first)
    shares = parts.abs() / parts.abs().sum().clamp(min=torch.finfo(parts.dtype).tiny)
    parts = parts + shares * (total - parts.sum())
    return Realised(dict(zip(names, parts.tolist(), strict=True)), total, error)


def _whole_blocks(count: float) -> int:
    return BLOCK * math.ceil(count / BLOCK)
