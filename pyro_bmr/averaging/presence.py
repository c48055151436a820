"""How probable it is that each element is present, given the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_choice,
    read_count,
    read_number,
    read_positive,
    read_seed,
)
from pyro_bmr.averaging.model_space import FEWEST_SAMPLES, ModelSpace, read_spaces
from pyro_bmr.display import Tabular
from pyro_bmr.programs.alone import alone
from pyro_bmr.selection.problem import read_scores
from pyro_bmr.selection.scores import ElementScores


@alone("presence")
@torch.inference_mode(False)
@torch.no_grad()
def presence(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    prior: float | LearnedPrior = 0.5,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    num_samples: int = 2000,
    seed: int = 0,
) -> Presence:
    r"""Return the posterior probability that each element is there, rather than exactly zero.

    Under the prior that each element is there with the probability :math:`\pi`, independently,
    and then has the prior of the model, a set :math:`S` of absent elements has the posterior
    probability

    .. math:: P(S) \propto e^{-\Delta F_S} \left(\frac{1 - \pi}{\pi}\right)^{|S|}

    which for independent elements is
    :math:`P(i) = 1 / (1 + e^{-\Delta F_i - \operatorname{logit} \pi})`. For up to 16 correlated
    elements it is summed over all subsets; for more, a random walk over subsets estimates it
    (see ``pyro_bmr.averaging.subset_sampling``), and ``standard_error`` says how well.

    The guide, the param store and the random number generators are left as they were.

    Parameters
    ----------
    guide : callable
        A trained guide, as in `reduce`.
    *args
        Of the model, as in `reduce`.
    kwargs : mapping, optional
        Keyword arguments of the model.
    prior : float or LearnedPrior
        :math:`\pi`, the probability before the data; or how to learn it from them.
    model, sites : optional
        As in `reduce`.
    num_samples : int
        Steps of each of the 4 chains where there are more than 16 correlated elements.
    seed : int
        Of their random numbers.

    Returns
    -------
    Presence
        Probabilities by site.

    Raises
    ------
    ValueError
        If ``prior`` is not between 0 and 1, or ``num_samples`` is too small.

    References
    ----------
    Mitchell & Beauchamp (1988), "Bayesian variable selection in linear regression", JASA 83;
    Marković, Friston & Kiebel (2023), arXiv:2309.12095, for the learned prior.

    Examples
    --------
    >>> import pyro.distributions as dist, pyro
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([0.0, 1.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)
    >>> _ = guide()
    >>> presence(guide).probability["w"]
    tensor([0.3333, 0.7870])
    """
    check_options(prior, num_samples, seed)
    _, scores = read_scores("presence", guide, args, kwargs, model, sites)
    spaces = read_spaces(scores, num_samples, seed)
    log_odds = find_log_odds(spaces, scores, prior)
    probability: dict[str, Tensor] = {}
    standard_error: dict[str, Tensor] = {}
    methods: dict[str, str] = {}
    for space in spaces:
        found = space.presences(log_odds)
        probability |= found.probability
        standard_error |= found.standard_error
        methods |= dict.fromkeys(found.probability, found.method)
    return Presence(probability, standard_error, log_odds, methods)


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


@dataclass(frozen=True, eq=False, repr=False)
class Presence(Tabular):
    """The posterior probability that each element is present.

    Parameters
    ----------
    probability : mapping
        By reducible site, a tensor of its shape; 0 where an element was pruned before, 1 where it
        cannot go because it has no prior density at zero.
    standard_error : mapping
        The Monte Carlo standard error of that, by site; absent where the probability is exact.
    log_odds : mapping
        By site, the prior log odds: given, or ζ as it was learned.
    methods : mapping
        By site, how the probability was found.

    Examples
    --------
    >>> Presence({"w": torch.tensor([0.25, 0.75])}, {}, {"w": 0.0}).expected_kept
    1.0
    """

    probability: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor]
    log_odds: Mapping[str, float]
    methods: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def expected_kept(self) -> float:
        """How many elements are present on average."""
        return sum(float(p.sum(dtype=torch.float64)) for p in self.probability.values())

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``total``, ``prior`` (π), ``expected`` (elements present on
            average), ``P > 1/2`` and ``P > 0.95`` (how many), ``standard_error`` (the largest; 0
            where exact) and ``found by``.
        """
        rows = []
        for name, p in self.probability.items():
            error = self.standard_error.get(name)
            rows.append(
                {
                    "site": name,
                    "prior": 1 / (1 + math.exp(-self.log_odds[name])),
                    **count_present(p),
                    "standard_error": 0.0
                    if error is None or not error.numel()
                    else float(error.max()),
                    "found by": self.methods.get(name, ""),
                }
            )
        columns = ("total", "prior", "expected", "P > 1/2", "P > 0.95")
        names = ["site", *columns, "standard_error", "found by"]
        return pd.DataFrame(rows, columns=names).set_index("site")

    def __rich__(self) -> Table:
        table = Table("site", title=self._title, title_justify="left")
        columns = ("total", "prior π", "expected", "P > 1/2", "P > 0.95", "largest std. error")
        for column in columns:
            table.add_column(column, justify="right")
        table.add_column("found by")
        for name, row in self.summary().iterrows():
            table.add_row(
                str(name),
                f"{row['total']:,}",
                f"{row['prior']:.3g}",
                f"{row['expected']:,.1f}",
                f"{row['P > 1/2']:,}",
                f"{row['P > 0.95']:,}",
                f"{row['standard_error']:.1g}" if name in self.standard_error else "",
                row["found by"],
            )
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary().round(3)}

    @property
    def _title(self) -> str:
        total = sum(p.numel() for p in self.probability.values())
        return f"{self.expected_kept:,.1f} of {total:,} elements expected to be present"


def count_present(probability: Tensor) -> dict[str, float]:
    """Count the elements of a site: all, expected to be present, and probably so."""
    return {
        "total": probability.numel(),
        "expected": float(probability.sum(dtype=torch.float64)),
        "P > 1/2": int((probability > 0.5).sum()),
        "P > 0.95": int((probability > 0.95).sum()),
    }


def check_options(prior: float | LearnedPrior, num_samples: int, seed: int) -> None:
    """Check what `presence` and `average` have in common."""
    if not isinstance(prior, LearnedPrior):
        expected = (
            "the probability that an element is present, between 0 and 1 and neither of them, or "
            "pyro_bmr.LearnedPrior()"
        )
        read_number("prior", prior, lambda part: 0 < part < 1, expected)
    read_count("num_samples", num_samples, FEWEST_SAMPLES)
    read_seed(seed)


def find_log_odds(
    spaces: tuple[ModelSpace, ...], scores: ElementScores, prior: float | LearnedPrior
) -> dict[str, float]:
    """By reducible site, the prior log odds that an element is present, learned or not."""
    if not isinstance(prior, LearnedPrior):
        return dict.fromkeys(scores.delta_f, math.log(prior) - math.log1p(-prior))
    # Elements that cannot go say nothing about how many of those that can are present.
    closed = scores.unscored
    open_ = {name: int(scores.kept[name].count_nonzero()) - closed[name] for name in closed}
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
    return log_odds


_TOLERANCE = 1e-12
_ITERATIONS = 1000
_NOISY_ITERATIONS = 20


def _digamma(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64, device="cpu").digamma())
