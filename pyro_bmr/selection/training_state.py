"""Whether a guide looks trained: what its parameters show, and where its gradient leads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.estimators.parts_of_rows import BLOCK
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.flags import ScaleFlags
from pyro_bmr.selection.scores import ElementScores

# Of what the evidence promises, the part that F may still fall by in one step.
_MOST_FALL = 0.5
_MOST_WIDE = 0.05
# In nats, what F may fall by in any case: more where the evidence promises next to nothing, as
# after a reduction, which leaves of a trained guide's optimum a little to train.
_LITTLE, _LITTLE_OF_NOTHING = 1.0, 2.0


def describe_scales(scores: ElementScores, flags: ScaleFlags) -> tuple[str, ...]:
    """Say in words if the scales of a guide look untrained."""
    notes = []
    if flags.equal:
        names = ", ".join(flags.equal)
        notes.append(f"all posterior scales of {names} are equal, as before any training")
    wide, total = sum(flags.wide.values()), sum(one.numel() for one in scores.delta_f.values())
    if wide > _MOST_WIDE * total:
        notes.append(
            f"{wide:,} of {total:,} posterior scales are over 5 % wider than their prior: as a "
            "rule the guide has not been trained to its end"
        )
    return tuple(notes)


def describe_training(scores: ElementScores, decision: Decision, meter: Meter) -> tuple[str, ...]:
    """Say in words if a guide is, as measured, far from the optimum of F."""
    fall, error = measure_step(decision, meter)
    promised = sum(float((-one).clamp(min=0).sum()) for one in scores.delta_f.values())
    little = _LITTLE_OF_NOTHING if promised < _LITTLE else _LITTLE
    if fall <= max(little, 3 * error, _MOST_FALL * promised):
        return ()
    beside = f", where the evidence promises {promised:,.0f}" if promised >= _LITTLE else ""
    return (
        f"F still falls by {fall:,.{0 if fall >= 10 else 1}f} nats in one step down its gradient"
        f"{beside}: train the guide on, with a learning rate that falls",
    )


def measure_step(decision: Decision, meter: Meter) -> tuple[float, float]:
    """Return by how many nats F falls in a step down its gradient, in standard deviations of q.

    The largest fall over lengths of the step, measured, with its error; 0 at the optimum.
    """
    start = decision.restrict(())
    model, guide, _ = start.assemble()
    if not any(type(part.factor()) in _MOVES for part in guide.parts):
        return 0.0, 0.0
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
