"""Whether a guide looks trained: what its parameters show, and where its gradient leads."""

from __future__ import annotations

from pyro_bmr.estimators.meter import Meter
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.flags import count_wide
from pyro_bmr.selection.realised import measure_step
from pyro_bmr.selection.scores import ElementScores

# Of what the evidence promises, the part that F may still fall by in one step.
_MOST_FALL = 0.5
_MOST_WIDE = 0.05


def describe_training(
    scores: ElementScores, decision: Decision, meter: Meter | None
) -> tuple[str, ...]:
    """Say in words if a guide is far from the optimum of F; measured, if there is a meter."""
    if meter is None:
        return (*_equal_scales(scores), *_wide_scales(scores))
    fall, error = measure_step(decision, meter)
    promised = -sum(float(one.clamp(max=0).sum()) for one in scores.delta_f.values())
    if fall <= max(1.0, 3 * error, _MOST_FALL * promised):
        return ()
    return (
        f"F still falls by {fall:,.0f} nats in one step down its gradient, where the evidence "
        f"promises {promised:,.0f}: train the guide on, with a learning rate that falls",
    )


def _equal_scales(scores: ElementScores) -> tuple[str, ...]:
    names = [
        factor.site.name
        for factor in scores.factors
        if isinstance(factor, IndependentFactor)
        and factor.mask is None
        and factor.scale.numel() > 1
        and factor.scale.min() == factor.scale.max()
    ]
    if not names:
        return ()
    return (f"all posterior scales of {', '.join(names)} are equal, as before any training",)


def _wide_scales(scores: ElementScores) -> tuple[str, ...]:
    wide = sum(sum(count_wide(factor).values()) for factor in scores.factors)
    total = sum(one.numel() for one in scores.delta_f.values())
    if wide <= _MOST_WIDE * total:
        return ()
    return (
        f"{wide:,} of {total:,} posterior scales are over 5 % wider than their prior: as a rule "
        "the guide has not been trained to its end",
    )
