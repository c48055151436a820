r"""What to doubt in a reduction: scores that decide nothing, and posteriors that cannot be right.

A weight that the data say nothing about keeps its prior as its posterior, and has
:math:`\Delta F = 0`. A fitted guide misses that by the noise of its training, and the sign of
:math:`\Delta F`, which decides, is then that of the noise. A scale that is 5 % off its prior's
makes 0.05 nats, and the same 0.05 nats move the odds that an element is present by 5 %, whatever
led to them. So an element is called undecided where :math:`|\Delta F| < 0.05`: in terms of what is
decided, not of a divergence of posterior and prior, which needs a Gaussian prior, and which is
also large where the posterior is narrow and just as far from zero as to make nothing of it.

By the same 5 % a posterior is called wider than its prior. Where the likelihood is log-concave in
a weight data can only narrow its posterior, so that a wider one has not been trained to its end;
elsewhere it may be right, and is worth a look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import transform_to

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.transfers import find_extremes, to_numbers
from pyro_bmr.selection.scores import ElementScores

NOISE = 0.05
_FEW = 1000


def count_undecided(delta_f: Tensor, pruned_before: int) -> int:
    r"""Count the elements with :math:`|\Delta F| < 0.05` nats, but none pruned before."""
    return int((delta_f.abs() < NOISE).count_nonzero()) - pruned_before


@dataclass(frozen=True)
class ScaleFlags:
    """What to doubt in posterior scales.

    ``wide``, by site, counts the elements whose posterior is over 5 % wider than their Gaussian
    prior; ``equal`` names the sites of independent elements that all have the same scale.
    """

    wide: Mapping[str, int]
    equal: tuple[str, ...]


def flag_scales(factors: Sequence[Factor]) -> ScaleFlags:
    """Look at all scales, one pass over each."""
    wide = {
        name: wider.count_nonzero()
        for factor in factors
        for name, wider in _WIDER.get(type(factor), _wider)(factor, _limits(factor)).items()
    }
    counts = dict(zip(wide, to_numbers(list(wide.values())), strict=True))
    alike = [
        factor
        for factor in factors
        if type(factor) is IndependentFactor and factor.mask is None and factor.scale.numel() > 1
    ]
    # Of most sites already some of the first differ.
    for number in (_FEW, None):
        ends = find_extremes([factor.scale.flatten()[:number] for factor in alike])
        alike = [factor for factor, (low, high) in zip(alike, ends, strict=True) if low == high]
    return ScaleFlags(counts, tuple(factor.site.name for factor in alike))


def naive_delta_f(
    scores: ElementScores, masks: Mapping[str, Tensor], delta_f: Mapping[str, float]
) -> float | None:
    """Score what dropping correlated elements one by one, by their own ΔF, would have led to.

    Joint ΔF in nats, with independent elements as they are; None if nothing is correlated.
    """
    correlated = [f for f in scores.factors if isinstance(f, JointFactor) and f.priors]
    parts = dict(delta_f)
    for factor in correlated:
        naive = {name: scores.delta_f[name] > 0 for name in factor.priors}
        kept = factor.kept()
        if any(not torch.equal(mask, masks[n] & kept[n]) for n, mask in naive.items()):
            parts |= factor.delta_f(scores.delta_f, naive)
    return sum(parts.values()) if correlated else None


def _limits(factor: Factor) -> dict[str, Tensor]:
    """By site with a Gaussian prior, from where on a scale, as the factor has it, is too wide."""
    widest = {
        name: prior.gaussian.scale * math.exp(NOISE)
        for name, prior in factor.priors.items()
        if prior.gaussian is not None
    }
    if type(factor) is not IndependentFactor:
        return widest
    # What the guide optimises grows with the scale, so it can be compared as it is.
    transform = transform_to(factor.scale_constraint or constraints.real)
    return {n: transform.inv(limit).to(factor.scale.dtype) for n, limit in widest.items()}


def _wider(factor: Factor, widest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The scale of what was pruned before is 0.
    marginals = factor.marginals() if widest else {}
    scales = {name: marginals[name].scale for name in widest}
    return {name: scale > widest[name].to(scale.device) for name, scale in scales.items()}


def _wider_independent(
    factor: IndependentFactor, widest: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    wider = {n: factor.scale > limit.to(factor.scale.device) for n, limit in widest.items()}
    return wider if factor.mask is None else {n: t & factor.mask for n, t in wider.items()}


_WIDER: dict[type, Callable[..., dict[str, Tensor]]] = {IndependentFactor: _wider_independent}
