"""Bayesian model averaging over what a reduction could drop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from pyro_bmr.averaging.averaged_guide import AveragedGuide, Mixture, SpikeAndSlab
from pyro_bmr.averaging.model_space import (
    EnumeratedSpace,
    IndependentSpace,
    SampledSpace,
    read_spaces,
)
from pyro_bmr.averaging.occam_window import Window, find_window
from pyro_bmr.averaging.presence import LearnedPrior, check_options, find_log_odds, read_scores
from pyro_bmr.display import render, render_html
from pyro_bmr.factors.factor import Factor


@torch.no_grad()
def average(
    guide: Any,
    *,
    prior: float | LearnedPrior = 0.5,
    window: float = 20.0,
    max_models: int = 1000,
    model: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
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
    prior : float or LearnedPrior
        :math:`\pi`, the probability before the data that an element is present; or how to learn
        it from them.
    window : float
        How many times less probable than the best a model may be.
    max_models : int
        Of a correlated factor; the most probable ones stay.
    model, args, kwargs, sites : optional
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
    check_options(prior, num_samples)
    if not window >= 1:
        msg = f"got window={window!r}. Expected a ratio of probabilities of at least 1, such as 20"
        raise ValueError(msg)
    if not isinstance(max_models, int) or max_models < 1:
        msg = f"got max_models={max_models!r}. Expected at least 1"
        raise ValueError(msg)
    scores, whole = read_scores(guide, model=model, args=args, kwargs=kwargs, sites=sites)
    spaces = read_spaces(scores, num_samples, seed)
    log_odds = find_log_odds(spaces, scores, prior)
    independent = {s.name: s for s in spaces if isinstance(s, IndependentSpace)}
    windows = {
        space.elements.factor.sites[0].name: find_window(space, log_odds, window, max_models)
        for space in spaces
        if isinstance(space, EnumeratedSpace | SampledSpace)
    }
    averages = [
        _correlated(windows[factor.sites[0].name])
        if factor.sites[0].name in windows
        else _independent(factor, part, independent, log_odds)
        for factor, part in zip(scores.factors, whole.guide.parts, strict=True)
    ]
    return Average(
        model=whole.model.model,
        guide=AveragedGuide([a.part for a in averages], whole.guide.origin),
        presence={n: p for a in averages for n, p in a.presence.items() if n in scores.delta_f},
        mean={n: t for a in averages for n, t in a.mean.items()},
        variance={n: t for a in averages for n, t in a.variance.items()},
        log_odds=log_odds,
        windows=tuple(windows.values()),
    )


@dataclass(frozen=True, eq=False)
class Average:
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

    def __rich__(self) -> Group:
        sites = Table(
            title=f"average over models with {self.mass:.1%} of the probability",
            title_justify="left",
        )
        sites.add_column("site")
        for column in ("total", "expected", "P > 1/2", "P > 0.95"):
            sites.add_column(column, justify="right")
        for name, p in self.presence.items():
            sites.add_row(
                name,
                f"{p.numel():,}",
                f"{float(p.sum(dtype=torch.float64)):,.1f}",
                f"{int((p > 0.5).sum()):,}",
                f"{int((p > 0.95).sum()):,}",
            )
        return Group(sites, *(_table(window) for window in self.windows))

    def __repr__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        return render_html(self)


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
    mean = {name: marginal.loc for name, marginal in marginals.items()}
    variance = {name: marginal.scale.square() for name, marginal in marginals.items()}
    presence = {}
    for site in factor.sites:
        if site.name in spaces:
            slab = marginals[site.name]
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


def _table(window: Window) -> Table:
    names = ", ".join(site.name for site in window.factor.sites)
    table = Table(
        title=f"{names}: {len(window):,} models, {window.mass:.1%} of the probability",
        title_justify="left",
    )
    for column in ("weight", "ΔF (nats)", "kept"):
        table.add_column(column, justify="right")
    table.add_column("absent")
    left, masks = window.factor.kept(), window.masks
    for i in range(min(_ROWS, len(window))):
        absent = [
            f"{name}{index}" if index else name
            for name, mask in masks.items()
            for index in (left[name] & ~mask[i]).nonzero()[: _ROWS + 1].tolist()
        ]
        more = ", ..." if len(absent) > _ROWS else ""
        table.add_row(
            f"{window.weight[i]:.1%}",
            f"{window.delta_f[i]:+.2f}",
            f"{int(window.kept[i].sum()):,}",
            ", ".join(absent[:_ROWS]) + more,
        )
    if len(window) > _ROWS:
        table.caption = f"and {len(window) - _ROWS:,} less probable ones"
    return table
