"""Scores of predictions, each with what its error and that of a difference follow from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from pyro_bmr.diagnostics.calibration import bin_confidences, calibration_error
from pyro_bmr.diagnostics.draws import Draws, Observed

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLES = 200


def score_draws(draws: Draws) -> tuple[dict[str, Score], pd.DataFrame | None]:
    r"""Score the mean prediction of all draws, over the rows of all observed sites together.

    What a mask leaves out is not scored.

    ``log_likelihood`` is :math:`\frac1n \sum_i \ln \frac1S \sum_s p(y_i \mid \theta_s)` in nats per
    row. Where a distribution has a mean, ``rmse`` is the root mean squared error of the mean of all
    draws. Of classes, with the mean of their probabilities, ``correct`` is the fraction of rows of
    which the most probable one is right, ``nll`` the negative logarithm of the probability of the
    right one, ``brier`` the squared error of all (half of it where there are two, as in
    scikit-learn), and ``ece`` the expected calibration error of 15 bins. Without classes there is
    no table of `bin_confidences`.
    Source: Gneiting & Raftery (2007), "Strictly proper scoring rules, prediction, and estimation".
    """
    check_predictions(draws)
    sites = [site for site in draws.observed.values() if site.rows.any()]
    densities = torch.cat([_density(site) for site in sites])
    scores = {"log_likelihood": Score.mean(densities)}
    classified = [(site, _chances(site)) for site in sites if site.probabilities is not None]
    measured = [s for s in sites if s.mean is not None and s.probabilities is None]
    if measured:
        # The root of a mean moves by half the mean's change over the root.
        square = torch.cat([_squares(site) for site in measured])
        root = square.mean().sqrt()
        slope = 0.5 / root if root > 0 else 0.0
        scores["rmse"] = Score(float(root), square * slope, len(square) ** -0.5)
    if not classified:
        return scores, None
    columns = max(chances.shape[-1] for _, chances in classified)
    chances = torch.cat([pad(one, (0, columns - one.shape[-1])) for _, one in classified])
    classes = torch.cat([site.value.reshape(-1).long().cpu()[site.rows] for site, _ in classified])
    right = chances.gather(-1, classes[:, None])[:, 0]
    brier = (chances - one_hot(classes, columns)).square().sum(-1) / (2 if columns == 2 else 1)
    resampled = calibration_error(chances, classes, resamples=_RESAMPLES)
    scores |= {
        "correct": Score.mean((chances.argmax(-1) == classes).double()),
        "nll": Score.mean(-right.log()),
        "brier": Score.mean(brier),
        "ece": Score(float(resampled[0]), resampled[1:], 1.0),
    }
    return scores, bin_confidences(chances, classes)


def check_predictions(draws: Draws) -> None:
    """Raise a ``ValueError`` if there are no data, or if they or their densities are not finite."""
    if not any(site.rows.any() for site in draws.observed.values()):
        masked = ", or masks all of it" if draws.observed else ""
        msg = (
            f"the model observes nothing with these arguments{masked}. Expected data: pass the "
            "targets too, as in compare(pairs, x, y, test=(x_test, y_test))"
        )
        raise ValueError(msg)
    for name, site in draws.observed.items():
        bad = int((~_density(site).isfinite()).sum())
        value = site.value if site.counted is None else site.value[site.counted]
        if bad or (value.is_floating_point() and not value.isfinite().all()):
            msg = (
                f"the data or their densities at the site {name!r} are NaN or infinite "
                f"({bad} densities). Expected finite data that the model can make"
            )
            raise ValueError(msg)


@dataclass(frozen=True, eq=False)
class Score:
    """A number with its standard error, and with that of its difference from another.

    ``terms`` are what it varies with, one per row, draw or resample, in the same order for all that
    are compared; ``scale`` times their standard deviation is the error: 1 / sqrt(n) for a mean.
    """

    value: float
    terms: Tensor
    scale: float

    @classmethod
    def mean(cls, rows: Tensor) -> Score:
        """Average rows."""
        return cls(float(rows.mean()), rows, len(rows) ** -0.5)

    @classmethod
    def sum(cls, rows: Tensor) -> Score:
        """Add up rows."""
        return cls(float(rows.sum()), rows, len(rows) ** 0.5)

    @property
    def error(self) -> float:
        """The standard error; 0 of a single row, of which none is known."""
        return float(self.terms.std() * self.scale) if len(self.terms) > 1 else 0.0

    def __sub__(self, other: Score) -> Score:
        return Score(self.value - other.value, self.terms - other.terms, self.scale)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def _density(site: Observed) -> Tensor:
    log_prob = site.log_prob.detach().cpu().double()
    return (log_prob.logsumexp(0) - math.log(len(log_prob))).reshape(-1)[site.rows]


def _squares(site: Observed) -> Tensor:
    """Squared errors, a mean over each event."""
    assert site.mean is not None
    square = (site.mean.detach().double().mean(0) - site.value.double()).square().cpu()
    counted = torch.ones_like(square) if site.counted is None else site.counted.cpu().double()
    square = torch.where(counted > 0, square, 0.0)
    total, count = (x.reshape(len(site.rows), -1)[site.rows].sum(-1) for x in (square, counted))
    return total / count


def _chances(site: Observed) -> Tensor:
    """Of each datum, the mean probabilities of its classes."""
    assert site.probabilities is not None
    chances = site.probabilities.detach().cpu().double().mean(0)
    return chances.reshape(-1, chances.shape[-1])[site.rows]
