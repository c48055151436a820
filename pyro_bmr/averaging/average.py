"""Bayesian model averaging over what a reduction could drop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import read_count, read_names, read_number, read_seed, refuse
from pyro_bmr.arguments.patterns import find_names
from pyro_bmr.averaging.averaged_guide import AveragedGuide
from pyro_bmr.averaging.contrasts import Probability, add_up, read_contrast
from pyro_bmr.averaging.element_names import ElementNames, read_names_of
from pyro_bmr.averaging.factor_averages import (
    FactorAverage,
    average_correlated,
    average_independent,
    join_covariances,
)
from pyro_bmr.averaging.model_priors import LearnedPrior, check_options, find_log_odds
from pyro_bmr.averaging.model_space import (
    EnumeratedSpace,
    IndependentSpace,
    LogOdds,
    PresenceTally,
    SampledSpace,
    open_elements,
    read_spaces,
)
from pyro_bmr.averaging.occam_window import Window, WindowTally, window_of_all
from pyro_bmr.averaging.presence import are_single, count_present, draw_elements
from pyro_bmr.averaging.subset_mixtures import SubsetMixture, SubsetTally, mix_all
from pyro_bmr.averaging.window_tables import draw_window, frame_window, note_rest, title_window
from pyro_bmr.display import Tabular
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.mathematics.reduced_priors import Spike
from pyro_bmr.moments.names import Layout
from pyro_bmr.programs.alone import alone
from pyro_bmr.selection.problem import read_scores, read_spike

if TYPE_CHECKING:
    import pandas as pd


@alone("average")
@torch.inference_mode(False)
@torch.no_grad()
def average(
    guide: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    prior: float | Mapping[str, Any] | LearnedPrior = 0.5,
    expected: float | None = None,
    window: float = math.exp(8),
    max_models: int = 1000,
    model: Callable[..., Any] | None = None,
    sites: Iterable[str] | None = None,
    reduced_prior: Spike = Spike(),
    num_samples: int = 2000,
    seed: int = 0,
) -> Average:
    r"""Average over all reduced models, each weighted by its posterior probability.

    .. math:: q(\theta) = \sum_S P(S) \, \delta(\theta_S) \, q(\theta_R \mid \theta_S = 0),
              \quad P(S) \propto e^{-\Delta F_S} \prod_{i \in S} \frac{1 - \pi_i}{\pi_i}

    Where elements are independent the sum over all subsets factorises: each element is zero with
    the probability :math:`1 - p_i` and otherwise as in the posterior, with the mean
    :math:`p_i \mu_i` and the variance :math:`p_i \sigma_i^2 + p_i (1 - p_i) \mu_i^2`. That is
    exact for any number of elements. In a correlated factor of which up to 16 elements can go, the
    sum goes over all their subsets, and is exact, too. Of more, a random walk visits the subsets
    as often as they are probable, as in `presence`: the average is that of the models visited, and
    comes with Monte Carlo errors.

    Beside that, ``windows`` list the models of each correlated factor that are at most ``window``
    times less probable than the best, and which part of the probability these have.

    The guide, the param store and the random number generators are left as they were.

    Parameters
    ----------
    guide : callable
        A trained guide, as in `reduce`.
    *args
        Of the model, as in `reduce`.
    kwargs : mapping, optional
        Keyword arguments of the model.
    prior : float, mapping or LearnedPrior
        :math:`\pi`, the probability before the data that an element is present; as in `presence`.
    expected : float, optional
        In place of ``prior``, how many elements are present on average; as in `presence`.
    window : float
        How many times less probable than the best a model may be to be listed: :math:`e^8`.
    max_models : int
        How many to list of a correlated factor; the most probable ones stay.
    model, sites : optional
        As in `reduce`.
    reduced_prior : Spike
        At zero; its ``rest`` says what a correlated prior leaves of what stays.
    num_samples, seed : int
        As in `presence`.

    Returns
    -------
    Average
        Moments, intervals, probabilities, draws, the best models, and a guide that draws from the
        mixture.

    Raises
    ------
    ValueError
        If an option is not possible.

    References
    ----------
    Hoeting et al. (1999), "Bayesian model averaging: a tutorial", Statist. Sci. 14(4), eqs. 1-2;
    Madigan & Raftery (1994), JASA 89(428), eq. 3, for the window, which is 8 nats wide in SPM.

    Examples
    --------
    >>> import pyro.distributions as dist, pyro
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([0.0, 1.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)
    >>> _ = guide()
    >>> found = average(guide)
    >>> found.mean["w"], found.probability({"w[1]": 1.0}, above=0.5).value
    (tensor([0.0000, 0.7870]), 0.66...)
    """
    check_options(prior, expected, num_samples, seed)
    told = "a ratio of probabilities of at least 1, such as 20"
    window = read_number("window", window, lambda ratio: ratio >= 1, told)
    max_models = read_count("max_models", max_models)
    problem, scores = read_scores(
        "average", guide, args, kwargs, model, sites, read_spike(reduced_prior)
    )
    spaces = read_spaces(scores, num_samples, seed)
    names = read_names_of(guide, {name: one.shape for name, one in scores.delta_f.items()})
    log_odds = find_log_odds(spaces, scores, prior, expected, names)
    by_site = {space.name: space for space in spaces if isinstance(space, IndependentSpace)}
    joint = {
        space.elements.factor.sites[0].name: space
        for space in spaces
        if isinstance(space, EnumeratedSpace | SampledSpace)
    }
    whole = PrunedGuide(scores.factors, problem.origin)
    averages, windows = [], []
    for factor, part in zip(scores.factors, whole.parts, strict=True):
        name = factor.sites[0].name
        if name in joint:
            averaged, found = _correlated(joint[name], log_odds, window, max_models)
            averages.append(averaged)
            windows.append(found)
        elif isinstance(factor, JointFactor):
            mixture = mix_all(EnumeratedSpace(open_elements(factor)), {})
            averages.append(average_correlated(mixture, {}, {}, part))
        else:
            space = by_site.get(name)
            present = {} if space is None else space.presences(log_odds).probability
            averages.append(average_independent(factor, part, present))
    full_model: Any = problem.origin.model
    return Average(
        model=full_model,
        guide=AveragedGuide([a.part for a in averages], whole.origin),
        presence=_merge(a.presence for a in averages),
        mean=_merge(a.mean for a in averages),
        variance=_merge(a.variance for a in averages),
        log_odds=log_odds,
        windows=tuple(windows),
        presence_error=_merge(a.presence_error for a in averages),
        mean_error=_merge(a.mean_error for a in averages),
        variance_error=_merge(a.variance_error for a in averages),
        factors=tuple(averages),
        labels=names.layout.labels,
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
        The most probable models of each correlated factor.
    presence_error, mean_error, variance_error : mapping
        By site, the Monte Carlo standard errors of these; without sites whose numbers are exact.
    factors : tuple of FactorAverage
        What the methods look at.
    labels : mapping
        By site of a posterior with labels, these along each axis.

    Examples
    --------
    >>> present = {"w": torch.tensor([0.1, 0.97])}
    >>> print(Average(None, None, present, {}, {}, {}, ()))
    average over all reduced models
    ...
    """

    model: Callable[..., Any]
    guide: AveragedGuide
    presence: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    log_odds: LogOdds
    windows: tuple[Window, ...]
    presence_error: Mapping[str, Tensor] = field(default_factory=dict)
    mean_error: Mapping[str, Tensor] = field(default_factory=dict)
    variance_error: Mapping[str, Tensor] = field(default_factory=dict)
    factors: tuple[FactorAverage, ...] = ()
    labels: Mapping[str, tuple[tuple[Any, ...], ...]] = field(default_factory=dict)

    @property
    def mass(self) -> float:
        """The posterior probability, among all reduced models, of those that windows list."""
        return math.prod(window.mass for window in self.windows)

    @cached_property
    def covariance(self) -> dict[str, Tensor]:
        """By site, the covariance of its elements in float64, without sites of more than 2,048.

        `joint_covariance` has the rest.
        """
        return {
            site.name: self.joint_covariance([site.name])
            for factor in self.factors
            if factor.size <= _LARGEST
            for site in factor.sites
        }

    def joint_covariance(self, sites: str | Iterable[str]) -> Tensor:
        """Return the covariance of the elements of some sites.

        Parameters
        ----------
        sites : iterable of str
            Their names, fields or patterns, as in `reduce`.

        Returns
        -------
        Tensor
            Of shape ``(n, n)`` and in float64, over the flattened sites, one after the other; of
            independent sites it is diagonal.

        Raises
        ------
        ValueError
            If a site is not in the guide, or there are more than 16,384 elements.
        """
        shapes = self._shapes
        given = read_names("sites", sites) or ()
        names = [one for name in given for one in find_names(name, shapes) or [name]]
        if any(name not in shapes for name in names) or len({*names}) < len(names):
            refuse("sites", names, f"different ones of {sorted(shapes)}")
        needed = [f for f in self.factors if {site.name for site in f.sites} & {*names}]
        count = sum(factor.size for factor in needed)
        if count > _LARGEST_JOINT:
            told = f"sites, with those that depend on them, of up to {_LARGEST_JOINT:,} elements"
            refuse("sites", names, f"{told}, not {count:,}; variance has any number")
        return join_covariances(needed, names)

    def interval(self, mass: float = 0.9) -> dict[str, Tensor]:
        """Return the central credible interval of every element, between two quantiles.

        Where zero has a probability of its own, an end can be exactly 0.

        Parameters
        ----------
        mass : float
            The probability inside, between 0 and 1.

        Returns
        -------
        dict of Tensor
            By site, of shape ``(2, *site)``: the lower and the upper ends, in unconstrained
            coordinates; without sites whose posterior is not Gaussian.

        Raises
        ------
        ValueError
            If ``mass`` is not between 0 and 1.
        """
        told = "a probability between 0 and 1 and neither of them"
        mass = read_number("mass", mass, lambda part: 0 < part < 1, told)
        levels = ((1 - mass) / 2, (1 + mass) / 2)
        return _merge(factor.quantiles(levels) for factor in self.factors if factor.is_gaussian)

    def probability(
        self, contrast: Mapping[str, Any], above: float = 0.0, seed: int = 0
    ) -> Probability:
        r"""Return :math:`P(a^\top \theta > c)` of a linear combination of elements.

        Exact as a sum of normal tails over the models where the sites are, and where the models
        of several factors have up to two million combinations; otherwise the mean of such tails
        over draws of models.

        Parameters
        ----------
        contrast : mapping
            :math:`a`: by site, coefficients that broadcast to it, or by element, as in
            ``{"w[0]": 1.0, "w[1]": -1.0}``, or pattern; all others are 0. Elements of a posterior
            with labels go by these. In unconstrained coordinates.
        above : float
            :math:`c`.
        seed : int
            Of the draws.

        Returns
        -------
        Probability
            Its ``value`` and its Monte Carlo ``standard_error``, 0 where it is exact.

        Raises
        ------
        ValueError
            If a site or an element is not there, coefficients do not fit, or the posterior of a
            site is not Gaussian.
        """
        above = read_number("above", above, math.isfinite, "a finite number")
        read_seed(seed)
        device = next(iter(self.mean.values())).device
        shapes = {site.name: site.shape for f in self.factors if f.is_gaussian for site in f.sites}
        names = ElementNames(Layout(shapes, self.labels))
        coefficients = read_contrast(contrast, names, device)
        parts = []
        for factor in self.factors:
            mine = {s.name: coefficients[s.name] for s in factor.sites if s.name in coefficients}
            parts += factor.combine(mine) if mine else []
        generator = torch.Generator(device).manual_seed(seed)
        return add_up(parts, generator).probability(above)

    def draw(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw from the average: a model, then the elements, exactly 0 where it has none.

        Parameters
        ----------
        num_samples : int
            How many draws.
        seed : int
            Of their random numbers.

        Returns
        -------
        dict of Tensor
            By site, of shape ``(num_samples, *site)``, in unconstrained coordinates;
            `pyro.infer.Predictive` with ``model`` and ``guide`` draws values and predictions.
        """
        num_samples = read_count("num_samples", num_samples)
        read_seed(seed)
        device = next(iter(self.mean.values())).device
        generator = torch.Generator(device).manual_seed(seed)
        return _merge(factor.draw(num_samples, generator) for factor in self.factors)

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``total``, ``expected`` (elements present on average), and
            ``P > 1/2`` and ``P > 0.95`` (how many).
        """
        import pandas as pd

        rows = {name: count_present(p) for name, p in self.presence.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    def parameters(self) -> pd.DataFrame:
        """Return a table with one row per element of sites of one element, as SPM's are.

        Returns
        -------
        DataFrame
            Indexed by element; columns ``P``, the probability that it is present, NaN where it
            cannot go or was not asked for; ``mean`` and ``sd`` under the average.
        """
        import pandas as pd

        single = [name for name, one in self.mean.items() if one.numel() == 1]
        columns = {
            "P": [
                float(self.presence[name]) if name in self.presence else math.nan for name in single
            ],
            "mean": [float(self.mean[name]) for name in single],
            "sd": [float(self.variance[name]) ** 0.5 for name in single],
        }
        return pd.DataFrame(columns, index=pd.Index(single, name="element"))

    def __rich__(self) -> Group:
        windows = [draw_window(window) for window in self.windows]
        if are_single(self.mean):
            return Group(draw_elements(self.parameters(), self._title), *windows)
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
        return Group(sites, *windows)

    def _frames(self) -> dict[str, pd.DataFrame]:
        windows = {title_window(w): frame_window(w) for w in self.windows}
        rounded = {
            title: frame.round({"weight": 3, "delta_f": 2}) for title, frame in windows.items()
        }
        frame = self.parameters() if are_single(self.mean) else self.summary()
        return {self._title: frame.round(3)} | rounded

    @property
    def _notes(self) -> tuple[str, ...]:
        return tuple(filter(None, map(note_rest, self.windows)))

    @property
    def _title(self) -> str:
        walked = " that walks visited" if self.mean_error else ""
        return f"average over all reduced models{walked}"

    @property
    def _shapes(self) -> dict[str, torch.Size]:
        return {site.name: site.shape for factor in self.factors for site in factor.sites}


# Of factors of so many elements a covariance is among all, and of so many there is one.
_LARGEST, _LARGEST_JOINT = 2048, 16384


def _merge(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _correlated(
    space: EnumeratedSpace | SampledSpace, log_odds: LogOdds, ratio: float, most: int
) -> tuple[FactorAverage, Window]:
    if isinstance(space, EnumeratedSpace):
        window = window_of_all(space, log_odds, ratio, most)
        mixture: SubsetMixture = mix_all(space, log_odds)
        found = space.presences(log_odds)
    else:
        tallies = (
            PresenceTally(space, space.num_samples),
            WindowTally(space, log_odds, ratio, most),
            SubsetTally(space),
        )
        for visit in space.visits(log_odds, space.num_samples):
            for tally in tallies:
                tally.add(visit)
        presences, best, some = tallies
        found, window, mixture = presences.presences(), best.window(), some.mixture()
    return average_correlated(mixture, found.probability, found.standard_error), window
