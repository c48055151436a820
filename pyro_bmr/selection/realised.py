"""What a reduction did to F, and how far the guide was from the optimum of F, both measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.meter import BLOCK, Meter
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.selection.decision import Decision

# Rows that are measured at once, of more.
ROWS = 6_000
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
    return Meter(decision.assemble()[:2], origin.args, origin.kwargs, batch_size, seed)


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


def measure_step(decision: Decision, meter: Meter) -> tuple[float, float]:
    """Return by how many nats F falls in a step down its gradient, in standard deviations of q.

    The largest fall over lengths of the step, measured, with its error; 0 at the optimum.
    """
    start = decision.restrict(())
    model, guide, _ = start.assemble()
    halves = meter.differentiate((model, guide), 2 * BLOCK, start.couplings())
    before = meter.measure((model, guide), 0, 2 * BLOCK, start.couplings())
    fall, error = 0.0, 0.0
    for length in _LENGTHS:
        _, moved, _ = start.assemble()
        for part, *gradients in zip(moved.parts, *halves, strict=True):
            factor = part.factor()
            gradient = {n: (one + gradients[1][n]) / 2 for n, one in gradients[0].items()}
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


def _move_joint(
    part: Any, factor: JointFactor, gradient: Mapping[str, Tensor], length: float
) -> None:
    root = factor.posterior.root()
    part.loc_unconstrained.data -= length * (root @ (root.mT @ gradient["loc_unconstrained"]))


_MOVES: Any = {IndependentFactor: _move_independent, JointFactor: _move_joint}
