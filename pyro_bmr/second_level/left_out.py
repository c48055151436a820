"""A covariate of each subject, predicted from the posteriors of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.display import Tabular
from pyro_bmr.mathematics.likelihoods import Likelihoods
from pyro_bmr.mathematics.two_levels import GivenGamma, condition, fit_hyperparameters
from pyro_bmr.plots.canvas import one_axes
from pyro_bmr.plots.theme import BLUE, GREY, SMALL, VERMILION

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# The prior variance of the covariate, in variances of it among the others: SPM's.
_WIDER = 4.0
# A grid of so many points, which reaches 27 = sinh(4) standard deviations either way, since the
# tails may be heavy, and how often it is moved.
_POINTS, _REACH, _MOVES = 201, 4.0, 5


def predict_left_out(study: Any, covariate: str | None) -> LeftOut:
    """Predict a covariate of every subject from a fit to the others."""
    import pandas as pd
    from scipy.stats import pearsonr

    column = _choose(study.design, covariate)
    first, design, level = study.first, study.design.values, study.level
    actual = design[:, column]
    levels = actual.unique()
    if 2 * len(levels) > len(actual):
        levels = levels[:0]
    start = study.held
    if start is None:
        start = fit_hyperparameters(first.units, design, level).at
    means, spreads, chances = [], [], []
    for unit, subject in enumerate(first.subjects):
        others = torch.arange(len(design), device=design.device) != unit
        rest = design[others]
        _check_others(subject, study.design, rest)
        units = first.units.without(unit)
        gamma = start
        if study.held is None:
            gamma = fit_hyperparameters(units, rest, level, start).at
        found = condition(units, rest, level, gamma)
        if found is None:
            msg = f"without {subject!r} there is no proper posterior. Expected a narrower prior"
            raise ValueError(msg)
        line = _Line(first.units, unit, found, design[unit], column)
        known = rest[:, column]
        mean, spread = _integrate(line, float(known.mean()), float(_WIDER * known.var()))
        means.append(mean)
        spreads.append(spread)
        chances.append(line.log_likelihood(levels).softmax(0))
    predicted = np.array(means)
    truth = actual.cpu().numpy()
    result = pearsonr(truth, predicted, alternative="greater")
    index = pd.Index(first.subjects, name="subject")
    table = pd.DataFrame({"actual": truth, "predicted": predicted, "sd": spreads}, index=index)
    probability = None
    if len(levels):
        columns = pd.Index(levels.cpu().numpy(), name="level")
        probability = pd.DataFrame(torch.stack(chances).cpu().numpy(), index, columns)
    name = study.design.covariates[column]
    return LeftOut(name, table, probability, float(result.statistic), float(result.pvalue))


@dataclass(frozen=True, eq=False, repr=False)
class LeftOut(Tabular):
    """A covariate as predicted from the other subjects, beside what is true.

    Parameters
    ----------
    covariate : str
        Its name.
    predictions : DataFrame
        By subject, the columns ``actual``, ``predicted`` and ``sd``.
    probability : DataFrame or None
        By subject and level of the covariate, how probable that is; None where fewer than two
        subjects share a level on average.
    correlation, p_value : float
        Of what is predicted with what is true, and Pearson's test of it, with one side.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"actual": [1.0, -1.0], "predicted": [0.5, -1.2], "sd": [0.5, 0.5]})
    >>> LeftOut("group", table, None, 1.0, 0.5).plot().get_xlabel()
    'group'
    """

    covariate: str
    predictions: pd.DataFrame
    probability: pd.DataFrame | None
    correlation: float
    p_value: float

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per subject.

        Returns
        -------
        DataFrame
            Indexed by subject; columns ``actual``, ``predicted``, ``sd``, and ``P(level)`` for each
            level of a covariate that has levels.
        """
        if self.probability is None:
            return self.predictions
        named = self.probability.rename(columns=lambda level: f"P({level:g})")
        return self.predictions.join(named)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw what is predicted against what is true, with 90 % intervals.

        Parameters
        ----------
        ax : Axes, optional
            To draw on; of a new figure otherwise.

        Returns
        -------
        Axes
            A point per subject; those of a level are drawn side by side. Where the covariate has
            levels, circles are those whose true level is the most probable.
        """
        from scipy.stats import norm

        ax = one_axes(ax, 5.6, 4.4)
        table = self.predictions
        actual = table["actual"].to_numpy(float)
        reach = norm.ppf(0.95) * table["sd"].to_numpy(float)
        span = float(np.ptp(actual)) or 1.0
        order = table.groupby("actual").cumcount().to_numpy()
        size = table.groupby("actual")["sd"].transform("size").to_numpy()
        gap = np.diff(np.unique(actual)).min(initial=span)
        x = actual + 0.3 * gap * ((order + 0.5) / size - 0.5)
        y = table["predicted"].to_numpy(float)
        ax.vlines(x, y - reach, y + reach, color=BLUE, alpha=0.5, linewidth=1.2)
        right = np.ones(len(table), dtype=bool)
        if self.probability is not None:
            right = self.probability.idxmax(axis=1).to_numpy(float) == actual
        label = "subject, with 90 % interval"
        if self.probability is not None:
            label = f"most probable level is true: {right.sum()} of {len(right)}"
        ax.plot(x[right], y[right], "o", color=BLUE, markersize=5, label=label)
        if not right.all():
            ax.plot(x[~right], y[~right], "s", color=VERMILION, markersize=5, label="it is not")
        ends = np.array([actual.min() - 0.1 * span, actual.max() + 0.1 * span])
        ax.plot(ends, ends, color=GREY, linestyle=":", label="predicted = true", zorder=0)
        ax.set(xlabel=self.covariate, ylabel=f"{self.covariate}, predicted from the others")
        ax.set_title(self._title, loc="left")
        ax.legend(fontsize=SMALL, loc="upper left")
        return ax

    def __rich__(self) -> Table:
        frame = self.summary()
        table = Table("subject", title=self._title, title_justify="left")
        for column in frame.columns:
            table.add_column(str(column), justify="right")
        for name, row in frame.iterrows():
            table.add_row(str(name), *(f"{value:.3g}" for value in row))
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary()}

    @property
    def _title(self) -> str:
        return (
            f"{self.covariate} left out: correlation {self.correlation:.2f}, p = {self.p_value:.2g}"
        )


@dataclass(frozen=True)
class _Line:
    """The likelihood of a left-out subject along one covariate."""

    units: Likelihoods
    unit: int
    others: GivenGamma
    row: Tensor
    column: int

    def log_likelihood(self, values: Tensor) -> Tensor:
        """Give it at some values of the covariate, up to a constant."""
        covariates = len(self.row)
        rows = self.row.expand(len(values), covariates).clone()
        rows[:, self.column] = values
        means = rows @ self.others.mean.reshape(covariates, -1)
        size = means.shape[1]
        effects = self.others.covariance.reshape(covariates, size, covariates, size)
        spread = torch.einsum("na,aibj,nb->nij", rows, effects, rows)
        whole = spread + self.others.between_covariance
        return self.units.log_evidence(self.unit, means, whole)


def _integrate(line: _Line, centre: float, variance: float) -> tuple[float, float]:
    """Find mean and standard deviation, on a grid that is moved to where the posterior is."""
    unit = torch.linspace(-_REACH, _REACH, _POINTS, device=line.row.device, dtype=line.row.dtype)
    mean, spread = centre, variance**0.5
    for _ in range(_MOVES):
        values = mean + spread * unit.sinh()
        log_prior = -((values - centre) ** 2) / (2 * variance)
        log_density = line.log_likelihood(values) + log_prior + unit.cosh().log()
        if log_density.isnan().any():
            msg = (
                "a left-out subject's posterior is so much wider than its prior that it has none "
                "under the group's. Expected posteriors that the data narrowed"
            )
            raise ValueError(msg)
        weight = log_density.softmax(0)
        mean = float(weight @ values)
        spread = float((weight @ (values - mean) ** 2).sqrt())
        # A peak between two points has no width on the grid.
        spread = max(spread, 0.5 * float(values.diff().min()))
    return mean, spread


def _choose(design: Any, covariate: str | None) -> int:
    values, names = design.values, design.covariates
    varies = (values.amax(0) > values.amin(0)).tolist()
    free = [name for name, one in zip(names, varies, strict=True) if one]
    if covariate is None:
        if not free:
            refuse("covariate", None, "a design with a covariate that is not constant")
        covariate = free[0]
    if not (isinstance(covariate, str) and covariate in free):
        refuse("covariate", covariate, f"one of the covariates that vary, {free}")
    return names.index(covariate)


def _check_others(subject: str, design: Any, rest: Tensor) -> None:
    length = rest.norm(dim=0)
    if len(rest) < rest.shape[1] or not bool((length > 0).all()):
        depends = True
    else:
        singular = torch.linalg.svdvals(rest / length)
        depends = bool(singular[-1] < 1e-8 * singular[0])
    if depends:
        msg = (
            f"without {subject!r}, the covariates {list(design.covariates)} depend on each other: "
            "what one of them does is known from that subject alone. Expected a design of which "
            "every subject can be left out"
        )
        raise ValueError(msg)
