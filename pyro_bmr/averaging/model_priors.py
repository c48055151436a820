"""How probable it is before the data that each element is present, given or learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_choice,
    read_count,
    read_number,
    read_positive,
    read_seed,
    refuse,
)
from pyro_bmr.averaging.element_names import ElementNames, Places
from pyro_bmr.averaging.model_space import FEWEST_SAMPLES, ModelSpace
from pyro_bmr.moments.names import read_numbers
from pyro_bmr.selection.scores import ElementScores


@dataclass(frozen=True)
class LearnedPrior:
    r"""The probability that an element is present, learned from the data.

    :math:`\pi \sim \operatorname{Beta}(\alpha_0, \beta_0)` is shared, and its variational
    posterior :math:`\operatorname{Beta}(\alpha, \beta)` is the fixed point of

    .. math:: P(i) = \frac{1}{1 + e^{-\Delta F_i - \zeta}}, \quad
              \alpha = \alpha_0 + \sum_i P(i), \quad
              \beta = \beta_0 + \sum_i (1 - P(i)), \quad
              \zeta = \psi(\alpha) - \psi(\beta)

    where :math:`\zeta = \mathbb E[\operatorname{logit} \pi]` takes the place of the prior log
    odds and :math:`\psi` is the digamma function. It starts at
    :math:`\psi(\alpha_0) - \psi(\beta_0)`. Correlated elements enter with the probabilities that
    they have jointly.

    Parameters
    ----------
    alpha, beta : float
        :math:`\alpha_0` and :math:`\beta_0`.
    shared : str
        What shares :math:`\pi`: ``"site"`` or ``"model"``.

    References
    ----------
    Marković, Friston & Kiebel (2023), "Bayesian sparsification for deep neural networks with
    Bayesian model reduction", arXiv:2309.12095: the spike-and-slab scheme, whose code has
    :math:`\alpha_0 = \beta_0 = 1`, one :math:`\pi` per layer and four iterations.

    Examples
    --------
    >>> LearnedPrior(alpha=1.0, beta=9.0)
    LearnedPrior(alpha=1.0, beta=9.0, shared='site')
    """

    alpha: float = 1.0
    beta: float = 1.0
    shared: str = "site"

    def __post_init__(self) -> None:
        expected = "a positive number; 1.0 and 1.0 are a uniform prior of the probability"
        read_positive("alpha", self.alpha, expected)
        read_positive("beta", self.beta, expected)
        check_choice("shared", self.shared, ("site", "model"))


ModelPrior = float | Mapping[str, Any] | LearnedPrior

_EXPECTED = (
    "the probability that an element is present, between 0 and 1 and neither of them, such numbers "
    "or arrays by site, or pyro_bmr.LearnedPrior()"
)


def check_options(prior: ModelPrior, expected: float | None, num_samples: int, seed: int) -> None:
    """Check what `presence` and `average` have in common."""
    if not isinstance(prior, LearnedPrior | Mapping):
        read_number("prior", prior, lambda part: 0 < part < 1, _EXPECTED)
    if expected is not None:
        read_positive("expected", expected, "how many elements are present before the data")
        if prior != 0.5:
            refuse("prior", prior, "either prior= or expected=, not both")
    read_count("num_samples", num_samples, FEWEST_SAMPLES)
    read_seed(seed)


def find_log_odds(
    spaces: tuple[ModelSpace, ...],
    scores: ElementScores,
    prior: ModelPrior,
    expected: float | None,
    names: ElementNames,
) -> dict[str, float | Tensor]:
    """By reducible site, the prior log odds that an element is present, learned or not."""
    if isinstance(prior, LearnedPrior):
        return _learn(spaces, scores, prior)
    if isinstance(prior, Mapping):
        return _read_by_name(prior, scores, names)
    if expected is not None:
        count = sum(_count_open(scores).values())
        if expected >= count:
            refuse("expected", expected, f"fewer than all {count:,} elements that can go")
        prior = expected / count
    return dict.fromkeys(scores.delta_f, math.log(prior) - math.log1p(-prior))


def _read_by_name(
    prior: Mapping[str, Any], scores: ElementScores, names: ElementNames
) -> dict[str, float | Tensor]:
    log_odds: dict[str, float | Tensor] = dict.fromkeys(scores.delta_f, 0.0)
    for name, value in prior.items():
        place = f"prior[{name!r}]"
        part = read_numbers(place, value)
        if not ((part > 0) & (part < 1)).all():
            refuse(place, value, _EXPECTED)
        where, shape = names.locate(place, name)
        if not _broadcasts(part.shape, shape):
            refuse(place, value, f"a shape that broadcasts to {tuple(shape)}")
        if name not in log_odds:
            log_odds |= _with_elements(log_odds, where, part.logit().expand(shape), scores, names)
        elif part.dim():
            log_odds[name] = part.logit().to(scores.delta_f[name].device)
        else:
            log_odds[name] = float(part.logit())
    return log_odds


def _with_elements(
    log_odds: Mapping[str, float | Tensor],
    where: Places,
    part: Tensor,
    scores: ElementScores,
    names: ElementNames,
) -> dict[str, Tensor]:
    """Return the log odds of the sites of some elements, these with ones of their own."""
    given = torch.full((names.layout.size,), torch.nan, dtype=torch.float64, device="cpu")
    given[where] = part.cpu().reshape(-1)
    return {
        name: torch.where(own.isnan(), torch.as_tensor(log_odds[name], device=own.device), own)
        for name, one in names.layout.split(given).items()
        if not (own := one.to(scores.delta_f[name].device)).isnan().all()
    }


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False


def _count_open(scores: ElementScores) -> dict[str, int]:
    """By site, how many of the elements that are left can go."""
    closed = scores.unscored
    return {name: int(scores.kept[name].count_nonzero()) - closed[name] for name in closed}


def _learn(
    spaces: tuple[ModelSpace, ...], scores: ElementScores, prior: LearnedPrior
) -> dict[str, float | Tensor]:
    # Elements that cannot go say nothing about how many of those that can are present.
    closed, open_ = scores.unscored, _count_open(scores)
    shared = [list(open_)] if prior.shared == "model" else [[name] for name in open_]
    log_odds = dict.fromkeys(open_, _digamma(prior.alpha) - _digamma(prior.beta))
    exact = all(space.exact for space in spaces)
    for step in range(_ITERATIONS if exact else _NOISY_ITERATIONS):
        expected: dict[str, float] = {}
        for space in spaces:
            expected |= space.expected_kept(log_odds)
        change = 0.0
        for names in shared:
            present = sum(expected[name] - closed[name] for name in names)
            absent = sum(open_[name] for name in names) - present
            zeta = _digamma(prior.alpha + present) - _digamma(prior.beta + absent)
            move = zeta - log_odds[names[0]]
            # Where the expectation is noisy, later steps average over the noise.
            move /= 1 if exact else max(1, step - _NOISY_ITERATIONS // 4)
            log_odds |= dict.fromkeys(names, log_odds[names[0]] + move)
            change = max(change, abs(move))
        if change <= _TOLERANCE:
            break
    return dict(log_odds)


_TOLERANCE = 1e-12
_ITERATIONS = 1000
_NOISY_ITERATIONS = 20


def _digamma(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64, device="cpu").digamma())
