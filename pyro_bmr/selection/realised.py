"""What a reduction did to F, and how far the guide was from the optimum of F, both measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.meter import BLOCK, Meter
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.flags import NOISE

# Rows that are measured at once, of more.
ROWS = 12_000


@dataclass(frozen=True)
class Realised:
    """ΔF in nats as measured: by site in the order of the decision, in total, and its error."""

    by_site: Mapping[str, float]
    total: float
    error: float


def make_meter(decision: Decision, batch_size: int, seed: int) -> Meter:
    """Make a meter for what a decision leads to; ValueError if the model cannot be measured."""
    origin = decision.origin
    return Meter(decision.assemble()[:2], origin.args, origin.kwargs, batch_size, seed)


def measure_realised(decision: Decision, meter: Meter, most: int = 32) -> Realised:
    """Measure ΔF, all rows ``most`` times at most, as long as the error is over a percent of it."""
    names = decision.changed()
    if not names:
        return Realised({}, 0.0, 0.0)
    nothing, draws = torch.zeros(0, dtype=torch.float64), 0
    before = after = nothing
    while True:
        draws = max(BLOCK * math.ceil(meter.parts / BLOCK), 2 * draws)
        before = _measure(decision.restrict(()), meter, before, draws)
        after = _measure(decision, meter, after, draws)
        total, error = mean_and_error(after - before)
        if error <= max(NOISE, 0.01 * abs(total)) or draws >= most * meter.parts:
            break
    by_site, last = {}, before
    for i, name in enumerate(names, 1):
        here = after
        if i < len(names):
            here = _measure(decision.restrict(names[:i]), meter, nothing, draws)
        by_site[name], last = float((here - last).mean()), here
    return Realised(by_site, total, error)


def measure_step(decision: Decision, meter: Meter) -> tuple[float, float]:
    """Return by how many nats F falls in a step down its gradient, in standard deviations of q.

    The largest fall over lengths of the step, measured, with its error; 0 at the optimum.
    """
    start = decision.restrict(())
    model, guide, _ = start.assemble()
    gradients = meter.differentiate((model, guide), 2 * BLOCK, start.couplings())
    before = meter.measure((model, guide), 0, 2 * BLOCK, start.couplings())
    fall, error = 0.0, 0.0
    for length in _LENGTHS:
        _, moved, _ = start.assemble()
        for part, gradient in zip(moved.parts, gradients, strict=True):
            factor = part.factor()
            _MOVES.get(type(factor), _stay)(part, factor, gradient, length)
        after = meter.measure((model, moved), 0, 2 * BLOCK, start.couplings())
        mean, its_error = mean_and_error(before - after)
        if mean < fall:
            break
        fall, error = mean, its_error
    return fall, error


# From short to long, as long as F falls further.
_LENGTHS = [4.0**-k for k in range(6, -1, -1)]


def _stay(_part: Any, _factor: Factor, _gradient: Mapping[str, Tensor], _length: float) -> None:
    pass


def _move_independent(
    part: Any, factor: IndependentFactor, gradient: Mapping[str, Tensor], length: float
) -> None:
    # Of a Gaussian, F has the curvature 1/σ² in μ and 2 in ln σ at its optimum.
    scale = factor.stored.scale
    part.loc_unconstrained.data -= length * scale.square() * gradient["loc_unconstrained"]
    down = -0.5 * length * scale * factor.scale_gradient(gradient["scale_unconstrained"])
    longer = scale * down.clamp(-1, 1).exp()
    transform: Any = transform_to(factor.scale_constraint)
    part.scale_unconstrained.data.copy_(transform.inv(longer))


_MOVES: Any = {IndependentFactor: _move_independent}


def _measure(decision: Decision, meter: Meter, draws: Tensor, count: int) -> Tensor:
    pair, couplings = decision.assemble()[:2], decision.couplings()
    return torch.cat([draws, meter.measure(pair, len(draws), count, couplings)])
