"""Bayesian model averaging over what a reduction could drop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import read_count, read_number
from pyro_bmr.averaging.averaged_guide import AveragedGuide, Mixture, SpikeAndSlab
from pyro_bmr.averaging.model_space import (
    EnumeratedSpace,
    IndependentSpace,
    SampledSpace,
    read_spaces,
)
from pyro_bmr.averaging.occam_window import Window, find_window
from pyro_bmr.averaging.presence import (
    LearnedPrior,
    check_options,
    count_present,
    find_log_odds,
)
from pyro_bmr.display import Tabular
from pyro_bmr.factors.factor import Factor
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.programs.alone import alone
from pyro_bmr.selection.problem import read_scores


@alone("average")
@torch.inference_mode(False)
@torch.no_grad()
def average(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    prior: float | LearnedPrior = 0.5,
    window: float = 20.0,
    max_models: int = 1000,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    num_samples: int = 2000,
    seed: int = 0,
) -> Average:
    r"""Average over the reduced models, each weighted by its posterior probability.

    .. math:: q(\theta) = \sum_S P(S) \, \delta(\theta_S) \, q(\theta_R \mid \theta_S = 0),
              \quad P(S) \propto e^{-\Delta F_S} \left(\frac{1 - \pi}{\pi}\right)^{|S|}

    Where elements are independent the sum over all subsets factorises: each element is zero with
    the probability :math:`1 - p_i` and otherwise as in the posterior, with the mean
    :math:`p_i \mu_i` and the variance :math:`p_i \sigma_i^2 + p_i (1 - p_i) \mu_i^2`. That is
    exact for any number of elements. In a correlated factor the sum goes over the models of Occam's
    window, those at most ``window`` times less probable than the best; `Average.mass` is their
    share of the probability of all, exact for up to 16 elements and estimated by a random walk for
    more. A low mass means that no few models stand for all: then a larger window, or `presence`, is
    better.

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
        :math:`\pi`, the probability before the data that an element is present; or how to learn
        it from them.
    window : float
        How many times less probable than the best a model may be.
    max_models : int
        Of a correlated factor; the most probable ones stay.
    model, sites : optional
        As in `reduce`.
    num_samples, seed : int
        As in `presence`.

    Returns
    -------
    Average
        Moments, probabilities, the models, and a guide that draws from the mixture.

    Raises
    ------
    ValueError
        If an option is not possible.

    References
    ----------
    Madigan & Raftery (1994), "Model selection and accounting for model uncertainty in graphical
    models using Occam's window", JASA 89(428), eqs. 1-3; Hoeting et al. (1999), Statist. Sci.
    14(4).

    Examples
    --------
    >>> import pyro.distributions as dist, pyro
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([0.0, 1.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)
    >>> _ = guide()
    >>> average(guide).mean["w"]
    tensor([0.0000, 0.7870])
    """
    check_options(prior, num_samples, seed)
    expected = "a ratio of probabilities of at least 1, such as 20"
    window = read_number("window", window, lambda ratio: ratio >= 1, expected)
    max_models = read_count("max_models", max_models)
    problem, scores = read_scores("average", guide, args, kwargs, model, sites)
    spaces = read_spaces(scores, num_samples, seed)
    log_odds = find_log_odds(spaces, scores, prior)
    independent = {s.name: s for s in spaces if isinstance(s, IndependentSpace)}
    windows = {
        space.elements.factor.sites[0].name: find_window(space, log_odds, window, max_models)
        for space in spaces
        if isinstance(space, EnumeratedSpace | SampledSpace)
    }
    whole = PrunedGuide(scores.factors, problem.origin)
    full_model: Any = problem.origin.model
    averages = [
        _correlated(windows[factor.sites[0].name])
        if factor.sites[0].name in windows
        else _independent(factor, part, independent, log_odds)
        for factor, part in zip(scores.factors, whole.parts, strict=True)
    ]
    return Average(
        model=full_model,
        guide=AveragedGuide([a.part for a in averages], whole.origin),
        presence={n: p for a in averages for n, p in a.presence.items() if n in scores.delta_f},
        mean={n: t for a in averages for n, t in a.mean.items()},
        variance={n: t for a in averages for n, t in a.variance.items()},
        log_odds=log_odds,
        windows=tuple(windows.values()),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Average(Tabular):
    """A Bayesian model average over reduced models.

    Parameters
    ----------
    model : callable
        The full model, which goes with the guide in `pyro.infer.Predictive`. Its prior has no
        spikes, so that an ELBO of the two means nothing.
    guide : AveragedGuide
        Draws a reduced model by its weight, then the weights of that model.
    presence : mapping
        By reducible site, the probability under the average that each element is present.
    mean, variance : mapping
        By site, of every element under the average, in unconstrained coordinates.
    log_odds : mapping
        By reducible site, the prior log odds that an element is present.
    windows : tuple of Window
        The models of each correlated factor.

    Examples
    --------
    >>> present = {"w": torch.tensor([0.1, 0.97])}
    >>> print(Average(None, None, present, {}, {}, {}, ()))
    average over models with 100.0% of the probability
    ...
    """

    model: Callable[..., Any]
    guide: AveragedGuide
    presence: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    log_odds: Mapping[str, float]
    windows: tuple[Window, ...]

    @property
    def mass(self) -> float:
        """The posterior probability, among all reduced models, of those averaged over."""
        mass = 1.0
        for window in self.windows:
            mass *= window.mass
        return mass

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``total``, ``expected`` (elements present on average), and
            ``P > 1/2`` and ``P > 0.95`` (how many).
        """
        rows = {name: count_present(p) for name, p in self.presence.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    def __rich__(self) -> Group:
        sites = Table("site", title=self._title, title_justify="left")
        for column in ("total", "expected", "P > 1/2", "P > 0.95"):
            sites.add_column(column, justify="right")
        for name, row in self.summary().iterrows():
            sites.add_row(
                str(name),
                f"{row['total']:,.0f}",
                f"{row['expected']:,.1f}",
                f"{row['P > 1/2']:,.0f}",
                f"{row['P > 0.95']:,.0f}",
            )
        return Group(sites, *(_draw_window(window) for window in self.windows))

    def _frames(self) -> dict[str, pd.DataFrame]:
        windows = {_title_window(w): _frame_window(w) for w in self.windows}
        rounded = {
            title: frame.round({"weight": 3, "delta_f": 2}) for title, frame in windows.items()
        }
        return {self._title: self.summary().round(3)} | rounded

    @property
    def _notes(self) -> tuple[str, ...]:
        return tuple(filter(None, map(_note_rest, self.windows)))

    @property
    def _title(self) -> str:
        return f"average over models with {self.mass:.1%} of the probability"


# Of a window, so many models and of each so many absent elements are printed.
_ROWS = 10


@dataclass(frozen=True)
class _FactorAverage:
    part: Any
    presence: dict[str, Tensor]
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]


def _independent(
    factor: Factor,
    part: Any,
    spaces: Mapping[str, IndependentSpace],
    log_odds: Mapping[str, float],
) -> _FactorAverage:
    marginals = factor.marginals()
    mean = {name: marginal.loc.clone() for name, marginal in marginals.items()}
    variance = {name: marginal.scale.square() for name, marginal in marginals.items()}
    presence = {}
    for site in factor.sites:
        if site.name in spaces:
            marginal = marginals[site.name]
            slab = Diagonal(marginal.loc.clone(), marginal.scale.clone())
            p = presence[site.name] = spaces[site.name].presences(log_odds).probability[site.name]
            mean[site.name] = p * slab.loc
            variance[site.name] = p * slab.scale.square() + p * (1 - p) * slab.loc.square()
            part = SpikeAndSlab(site, slab, p)
    return _FactorAverage(part, presence, mean, variance)


def _correlated(window: Window) -> _FactorAverage:
    factor = window.factor
    posterior, _ = factor.left()
    mean, square = torch.zeros_like(posterior.loc), torch.zeros_like(posterior.loc)
    for kept, weight in zip(window.kept, window.weight, strict=True):
        _, rest = posterior.split(~kept)
        marginal = rest.marginals()
        mean[kept] += weight * marginal.loc
        square[kept] += weight * (marginal.scale.square() + marginal.loc.square())
    presence = window.weight @ window.kept.to(posterior.loc)
    dtype = factor.posterior.loc.dtype
    by_site = [
        factor.spread(t.to(dtype), 0.0)
        for t in (presence.clamp_max(1.0), mean, (square - mean.square()).clamp_min(0.0))
    ]
    return _FactorAverage(Mixture(window), *by_site)


def _title_window(window: Window) -> str:
    names = ", ".join(site.name for site in window.factor.sites)
    return f"{names}: {len(window):,} models, {window.mass:.1%} of the probability"


def _frame_window(window: Window) -> pd.DataFrame:
    """Make a data frame with one row per model, the most probable ones."""
    left, masks = window.factor.kept(), window.masks
    rows = []
    for i in range(min(_ROWS, len(window))):
        absent = [
            f"{name}{index}" if index else name
            for name, mask in masks.items()
            for index in (left[name] & ~mask[i]).nonzero()[: _ROWS + 1].tolist()
        ]
        more = ", ..." if len(absent) > _ROWS else ""
        kept = int(window.kept[i].sum())
        number = float(window.weight[i]), float(window.delta_f[i]), kept
        rows.append((*number, ", ".join(absent[:_ROWS]) + more))
    return pd.DataFrame(rows, columns=["weight", "delta_f", "kept", "absent"])


def _draw_window(window: Window) -> Table:
    table = Table(title=_title_window(window), title_justify="left")
    for column in ("weight", "ΔF (nats)", "kept"):
        table.add_column(column, justify="right")
    table.add_column("absent")
    for row in _frame_window(window).itertuples():
        table.add_row(f"{row.weight:.1%}", f"{row.delta_f:+.2f}", f"{row.kept:,}", str(row.absent))
    table.caption = _note_rest(window)
    return table


def _note_rest(window: Window) -> str | None:
    rest = len(window) - _ROWS
    return f"and {rest:,} less probable ones" if rest > 0 else None
