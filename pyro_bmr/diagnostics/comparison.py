"""`compare`: the free energy, cross-validation and predictions of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import check_switch, read_count, read_seed
from pyro_bmr.diagnostics.draws import Draws, draw
from pyro_bmr.diagnostics.elpd import leave_one_out
from pyro_bmr.diagnostics.scores import Score, check_predictions, score_draws
from pyro_bmr.display import Tabular, progress_bar
from pyro_bmr.estimators.measurement import common_draws
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.calls import check_call
from pyro_bmr.programs.data import read_data
from pyro_bmr.programs.pairs import read_pairs

if TYPE_CHECKING:
    import pandas as pd


@alone("compare")
@torch.inference_mode(False)
def compare(
    pairs: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 500,
    test: tuple[Any, ...] | None = None,
    loo: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    r"""Compare models with their guides: free energy, cross-validation, and predictions.

    .. math:: F = KL(q \,\|\, p) - E_q[\ln p(y \mid \theta)]

    is split into complexity and accuracy, in nats. ``elpd_loo`` is that of ``arviz.loo``. What is
    predicted is scored on test data: the log likelihood per row, the root mean squared error, and
    of classes the fraction that is right, the negative log likelihood (NLL), the Brier score and
    the expected calibration error (ECE, 15 bins); see `pyro_bmr.diagnostics.scores`.

    Each number has its standard error: of F by Monte Carlo, of others over rows (of the root mean
    squared error by the delta method, of the ECE by bootstrap). Differences from the first model
    have those of paired draws and rows, which are much smaller. The models, the guides, the param
    store and the random number generators are left as they were.

    Parameters
    ----------
    pairs : mapping, Reduction or tuple
        By name, what `reduce` or `prune` returned, or ``(model, guide)``; or one of these alone.
    *args
        Of all models and guides: all of the data that they were trained with.
    kwargs : mapping, optional
        Keyword arguments of all models and guides.
    num_samples : int
        Posterior draws; two or more.
    test : tuple, optional
        Positional arguments with test data; otherwise predictions of the training data are scored,
        and so labelled.
    loo : bool
        Whether to estimate ``elpd_loo``, for which ArviZ takes a millisecond per datum.
    seed : int
        Of all random numbers, the same for all models.
    progress : bool
        Show a progress bar, if there is a terminal or a notebook.

    Returns
    -------
    Comparison
        All scores, and the calibration of classes.

    Raises
    ------
    TypeError
        If an entry is no pair, or a model cannot be called with these arguments.
    ValueError
        If models observe different sites or data, or if something is NaN or infinite.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> guide, x = AutoNormal(model), torch.randn(7, 2)
    >>> _ = guide(x, x[:, 0])
    >>> comparison = compare({"untrained": (model, guide)}, x, x[:, 0], num_samples=50)
    >>> list(comparison.scores["untrained"])
    ['free_energy', 'complexity', 'accuracy', 'elpd_loo', 'log_likelihood', 'rmse']
    """
    programs = read_pairs(pairs)
    num_samples, seed = read_count("num_samples", num_samples, 2), read_seed(seed)
    check_switch("loo", loo)
    check_switch("progress", progress)
    tests = () if test is None else tuple(test) if isinstance(test, tuple | list) else (test,)
    first_pair = next(iter(programs.values()))
    args, kwargs = read_data(*first_pair, args, kwargs)
    for model, _ in programs.values():
        check_call(model, args, kwargs)
        if test is not None:
            _check_test(model, tests, kwargs)
    data, _ = (args, kwargs) if test is None else read_data(*first_pair, tests, kwargs)
    scores: dict[str, dict[str, Score]] = {}
    bad_k: dict[str, int] = {}
    notes: list[str] = []
    calibration: dict[str, pd.DataFrame] = {}
    first: list[Draws] = []
    with progress_bar("draws", progress) as bar:
        task = bar.add_task("measuring", total=num_samples * len(programs), note="")
        advance = partial(bar.advance, task)
        for name, pair in programs.items():
            bar.update(task, note=name)
            trained = draw(*pair, args, kwargs, num_samples, seed=seed)
            check_predictions(trained)
            tested = trained if test is None else draw(*pair, data, kwargs, num_samples, seed=seed)
            first = first or [trained, tested]
            for before, draws in zip(first, (trained, tested), strict=True):
                _check_same(name, draws, next(iter(programs)), before)
            terms = common_draws(*pair, args, kwargs, num_samples, seed=seed, advance=advance)
            mine = _split(*terms)
            sites = trained.observed.values()
            coupled = [site.coupling for site in sites if site.coupling]
            if loo and coupled:
                notes.append(f"{name}: no elpd_loo, which leaves out single rows: {coupled[0]}")
            elif loo:
                rows = [s.log_prob.reshape(num_samples, -1).cpu()[:, s.rows] for s in sites]
                found = leave_one_out(torch.cat(rows, -1))
                mine["elpd_loo"], bad_k[name] = Score.sum(found.terms), found.bad
                notes += [f"{name}: {found.note}"] if found.note else []
            predictions, bins = score_draws(tested)
            scores[name] = mine | predictions
            if bins is not None:
                calibration[name] = bins
    predicted = "training" if test is None else "test"
    return Comparison(scores, predicted, bad_k, calibration, tuple(notes))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Tabular):
    """Scores of several models.

    Parameters
    ----------
    scores : mapping
        By model and score. Of training data: ``free_energy``, ``complexity``, ``accuracy`` and
        ``elpd_loo``, in nats. Of the data of ``predicted``: ``log_likelihood`` (nats per row),
        ``rmse``, ``correct``, ``nll``, ``brier`` and ``ece``, as far as there are such.
    predicted : str
        ``"test"`` or ``"training"``: of which data the predictions are.
    bad_k : mapping
        By model, for how many data ``elpd_loo`` is not to be trusted, because their Pareto k is
        above min(0.7, 1 - 1 / log10 S) with S draws, which is 0.7 from 2,200 draws on.
    calibration : mapping
        By model that predicts classes, one row per bin; columns ``confidence``, ``accuracy`` and
        ``count``.
    notes : tuple of str
        Which models ``elpd_loo`` is not to be trusted of, and whether more draws would mend it.

    Examples
    --------
    >>> one, two = Score.mean(torch.tensor([1.0, 3.0])), Score.mean(torch.tensor([1.5, 3.5]))
    >>> comparison = Comparison({"full": {"rmse": one}, "reduced": {"rmse": two}}, "test")
    >>> comparison.differences()
             rmse  rmse_error
    model
    reduced   0.5         0.0
    """

    scores: Mapping[str, Mapping[str, Score]]
    predicted: str
    bad_k: Mapping[str, int] = field(default_factory=dict)
    calibration: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per model.

        Returns
        -------
        DataFrame
            Indexed by model; one column per score, each followed by its standard error, as
            ``rmse_error``; and ``bad_k``.
        """
        import pandas as pd

        frame = _frame(self.scores)
        return frame.assign(bad_k=pd.Series(self.bad_k)) if self.bad_k else frame

    def differences(self) -> pd.DataFrame:
        """Return the differences from the first model.

        Returns
        -------
        DataFrame
            Indexed by the other models; columns as in `summary`, with the standard errors of
            paired differences.
        """
        return _frame(self._differences)

    @property
    def _differences(self) -> dict[str, dict[str, Score]]:
        first, *others = self.scores
        base = self.scores[first]
        return {
            name: {
                key: score - base[key] for key, score in self.scores[name].items() if key in base
            }
            for name in others
        }

    def __rich__(self) -> Group:
        tables = [_draw(title, cells) for title, cells in self._frames().items()]
        return Group(*tables, *self.notes)

    @property
    def _notes(self) -> tuple[str, ...]:
        return self.notes

    def _frames(self) -> dict[str, pd.DataFrame]:
        tables = {f"predictions of {self.predicted} data": _write(self.scores)}
        if len(self.scores) > 1:
            title = f"difference from {next(iter(self.scores))}"
            tables[title] = _write(self._differences, sign="+")
        return tables


# By score: what to call it in a table, and what is better.
_LABELS = {
    "free_energy": "F (nats) ↓",
    "complexity": "  complexity",
    "accuracy": "  accuracy",
    "elpd_loo": "elpd_loo (nats) ↑",
    "log_likelihood": "log likelihood per row (nats) ↑",
    "rmse": "RMSE ↓",
    "correct": "correct ↑",
    "nll": "NLL ↓",
    "brier": "Brier score ↓",
    "ece": "ECE, 15 bins ↓",
}
# Those that grow with the data.
_TOTALS = {"free_energy", "complexity", "accuracy", "elpd_loo"}


def _check_test(
    model: Callable[..., Any], data: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    try:
        check_call(model, data, kwargs)
    except TypeError as error:
        msg = (
            f"test= does not fit: {error}. Keyword arguments are those of the test data too: pass "
            "by position what differs, as in compare(pairs, x, y, test=(x_test, y_test))"
        )
        raise TypeError(msg) from error


def _check_same(name: str, draws: Draws, first: str, before: Draws) -> None:
    if draws.observed.keys() != before.observed.keys():
        msg = (
            f"{name!r} observes {sorted(draws.observed)}, and {first!r} {sorted(before.observed)}. "
            "Expected models of the same data, under the same names"
        )
        raise ValueError(msg)
    for site, one in draws.observed.items():
        value, other = one.value.cpu(), before.observed[site].value.cpu()
        same = value.shape == other.shape and torch.allclose(
            value.double(), other.double(), equal_nan=True
        )
        if not same or not torch.equal(one.rows, before.observed[site].rows):
            msg = (
                f"{name!r} and {first!r} observe different values at {site!r}. Expected models of "
                "the same data, in the same units, with the same masks"
            )
            raise ValueError(msg)


def _split(complexity: Tensor, accuracy: Tensor) -> dict[str, Score]:
    parts = {"free_energy": complexity - accuracy, "complexity": complexity, "accuracy": accuracy}
    return {name: Score.mean(part) for name, part in parts.items()}


def _frame(scores: Mapping[str, Mapping[str, Score]]) -> pd.DataFrame:
    import pandas as pd

    rows = {
        name: {
            key: value
            for what, score in mine.items()
            for key, value in ((what, score.value), (f"{what}_error", score.error))
        }
        for name, mine in scores.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _write(scores: Mapping[str, Mapping[str, Score]], sign: str = "") -> pd.DataFrame:
    """Write each score with its error, one column per model."""
    import pandas as pd

    present = [key for key in _LABELS if any(key in mine for mine in scores.values())]

    def write(score: Score | None, digits: int) -> str:
        if score is None:
            return ""
        return f"{score.value:{sign}.{digits}f} ± {score.error:.{digits}f}"

    digits = {key: 2 if key in _TOTALS else 4 for key in present}
    cells = {
        name: [write(mine.get(key), digits[key]) for key in present]
        for name, mine in scores.items()
    }
    return pd.DataFrame(cells, index=[_LABELS[key] for key in present])


def _draw(title: str, cells: pd.DataFrame) -> Table:
    table = Table("", title=title, title_justify="left")
    for name in cells:
        table.add_column(str(name), justify="right")
    for label, row in cells.iterrows():
        table.add_row(str(label), *row)
    return table
