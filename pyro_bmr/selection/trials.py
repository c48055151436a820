"""Trials: what dropping some elements does to the measured free energy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.estimators.parts_of_rows import BLOCK
from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor, as_held
from pyro_bmr.factors.vanishing import vanishes
from pyro_bmr.mathematics.first_order import (
    first_order_correlated,
    first_order_gamma,
    first_order_independent,
    first_order_log_normal,
    settle,
)
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.realised import make_meter

# Of estimates, for a gradient where each is of a part of the rows.
_GRADIENT_BLOCKS = 4


class Trials:
    """A posterior of which more and more is dropped, as long as measured F falls.

    F at the ``start``, at the present and in a trial are compared at the same random numbers and
    rows: at few, and at up to ``num_samples`` batches of rows as long as the error leaves the
    outcome open. ``count`` says how often there was something to measure.
    """

    def __init__(self, start: Decision, num_samples: int, batch_size: int, seed: int) -> None:
        self.start, self.count = start, 0
        self._options = num_samples, batch_size
        self._meter = make_meter(start, batch_size, seed)
        self._most = BLOCK * math.ceil(max(num_samples, self._meter.parts) / BLOCK)
        self._first = self._present = self._tried = _Measured(start)
        self._check_finite()

    def measure(
        self,
        masks: Mapping[str, Tensor],
        around: Iterable[float] = (0.0,),
        errors: float = 2.0,
    ) -> tuple[float, float]:
        """Return ΔF of other masks against the present in nats, measured, and its error.

        Measured until it is clear, by so many errors, on which side of each number ``around`` it
        is, or for long.
        """
        from scipy.special import ndtr, stdtrit

        self._tried = _Measured(self.start.and_drop(masks))
        wanted = BLOCK
        while True:
            self.count += 1
            mean, error = self._compare(self._present, self._tried, wanted)
            bound = float(stdtrit(wanted - 1, ndtr(errors))) * error
            if wanted >= self._most or all(abs(mean - x) > bound for x in around):
                return mean, error
            wanted = min(2 * wanted, self._most)

    def accept(self) -> None:
        """Go on from what was measured last."""
        self._present = self._tried

    def total(self) -> tuple[float, float]:
        """Return ΔF of the present against the start in nats, and its error."""
        return self._compare(self._first, self._present, max(BLOCK, len(self._present.draws)))

    def again(self, seed: int) -> Trials:
        """Begin again, with other random numbers."""
        return Trials(replace(self.start, meter=self._meter), *self._options, seed)

    def first_order(self) -> dict[str, Tensor]:
        """By site, what the gradient of F at the present adds to ΔF of each element, in nats."""
        present = self._present.decision
        model, guide, _ = present.assemble()
        count = BLOCK * min(self._meter.parts, _GRADIENT_BLOCKS)
        halves = self._meter.differentiate((model, guide), count, present.couplings())
        shifts: dict[str, Tensor] = {}
        for before, part, *gradients in zip(present.factors, guide.parts, *halves, strict=True):
            factor, held = part.factor(), as_held(before)
            # An element that could take another prior than the spike does not go to zero.
            kind = type(factor), any(map(vanishes, before.priors.values()))
            if type(held) is type(factor) and kind in _SHIFTS:
                shift, find_marginals = _SHIFTS[kind]
                first, second = (shift(factor, one) for one in gradients)
                marginals = find_marginals(factor)
                shifts |= {n: settle(first[n], second[n], marginals[n]) for n in first}
        return shifts

    def _compare(self, before: _Measured, after: _Measured, count: int) -> tuple[float, float]:
        for one in (before, after):
            if len(one.draws) < count:
                pair, couplings = one.decision.assemble()[:2], one.decision.couplings()
                more = self._meter.measure(pair, len(one.draws), count, couplings)
                one.draws = torch.cat([one.draws, more])
        difference = after.draws[:count] - before.draws[:count]
        return mean_and_error(difference) if difference.isfinite().all() else (math.inf, 0.0)

    def _check_finite(self) -> None:
        self._compare(self._first, self._first, BLOCK)
        if not self._first.draws.isfinite().all():
            self._meter.raise_not_finite("of the guide")


@dataclass
class _Measured:
    """A decision, and estimates of F so far."""

    decision: Decision
    draws: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))


def _shift_independent(
    factor: IndependentFactor, gradient: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    (marginal,) = factor.marginals().values()
    d_scale = factor.scale_gradient(gradient["scale_unconstrained"])
    shift = first_order_independent(marginal, gradient["loc_unconstrained"], d_scale)
    return {factor.site.name: shift}


def _shift_joint(factor: JointFactor, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shift = first_order_correlated(
        factor.posterior.to(torch.float64), gradient["loc_unconstrained"]
    )
    return factor.spread(shift, 0.0)


def _shift_log_normal(
    factor: IndependentFactor, gradient: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    (marginal,) = factor.marginals().values()
    d_scale = factor.scale_gradient(gradient["scale_unconstrained"])
    shift = first_order_log_normal(marginal, gradient["loc_unconstrained"], d_scale)
    return {factor.site.name: shift}


def _shift_gamma(factor: GammaFactor, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    slopes = (gradient[f"{name}_unconstrained"] for name in ("mean", "concentration"))
    shift = first_order_gamma(factor.concentration, *slopes)
    return {name: torch.where(kept, shift, 0) for name, kept in factor.kept().items()}


def _gaussian_marginals(factor: Factor) -> dict[str, Diagonal]:
    return factor.marginals()


def _relative_marginals(factor: Factor) -> dict[str, Diagonal]:
    """Of positive elements, whose spread is relative to how far from zero they are."""
    return {n: Diagonal((m.scale > 0).to(m.scale), m.scale) for n, m in factor.marginals().items()}


# By kind of factor, and by whether what is dropped of it vanishes.
_SHIFTS: Any = {
    (IndependentFactor, False): (_shift_independent, _gaussian_marginals),
    (JointFactor, False): (_shift_joint, _gaussian_marginals),
    (IndependentFactor, True): (_shift_log_normal, _relative_marginals),
    (GammaFactor, True): (_shift_gamma, _relative_marginals),
}
