"""What a reduction did to F, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.meter import BLOCK, Meter
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


def make_meter(decision: Decision, batch_size: int, seed: int) -> Meter:
    """Make a meter for what a decision leads to; ValueError if the model cannot be measured."""
    origin = decision.origin
    pair = decision.assemble()[:2]
    with explained_refusals(*pair, origin.args, origin.kwargs):
        return Meter(pair, origin.args, origin.kwargs, batch_size, seed, origin.stream)


def measure_realised(decision: Decision, meter: Meter) -> Realised:
    """Measure ΔF, with all rows at least once, and as many draws however it comes out."""
    names = decision.changed()
    if not names:
        return Realised({}, 0.0, 0.0)
    draws = BLOCK * math.ceil(max(_DRAWS, meter.parts) / BLOCK)
    steps = [decision.restrict(names[:i]) for i in range(len(names) + 1)]
    measured = [meter.measure(step.assemble()[:2], 0, draws, step.couplings()) for step in steps]
    by_site = {
        name: float((after - before).mean())
        for name, before, after in zip(names, measured, measured[1:], strict=False)
    }
    return Realised(by_site, *mean_and_error(measured[-1] - measured[0]))
