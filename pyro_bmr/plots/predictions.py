"""What models predict, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_bmr.arguments.checks import read_seed, refuse
from pyro_bmr.diagnostics.drawn_sites import sort_sites
from pyro_bmr.diagnostics.draws import draw
from pyro_bmr.plots.canvas import one_axes
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import SMALL, series_styles, text_color
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.data import convert_data, read_data
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.pairs import read_pairs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@alone("plot_predictions")
def plot_predictions(
    pairs: Any,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    site: str | None = None,
    along: Any = None,
    data: tuple[Any, Any] | None = None,
    num_samples: int = 500,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw what models predict over an input: the mean, and where 90 % lie.

    Parameters
    ----------
    pairs : mapping, Reduction or tuple
        By name, what `reduce` or `prune` returned, or ``(model, guide)``; or one of these alone.
    *args
        Of models and guides: what to predict at, without targets or with.
    kwargs : mapping, optional
        Keyword arguments of models and guides.
    site : str, optional
        Which observation; needed where a model makes several.
    along : Tensor or ndarray, optional
        The input, one number per row. By default ``args[0]`` if it has one column; otherwise rows
        are sorted by what the first model predicts.
    data : tuple of Tensor, optional
        Inputs and targets to draw as points, where there is an input.
    num_samples : int
        Draws from each posterior; two or more.
    seed : int
        Of the draws.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        By model a line, the mean over draws; filled or hatched, 90 % of the mean of the observation
        over draws; and between thin lines, 90 % of the observations.

    Raises
    ------
    TypeError
        If something is no pair.
    ValueError
        If there is no model, the site is unknown, its observations have no mean, or more than one
        number per row, or ``along`` does not fit.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)
    >>> guide, x = AutoNormal(model), torch.linspace(-1, 1, 20)
    >>> _ = guide(x, x)
    >>> ax = plot_predictions({"full": (model, guide)}, x, num_samples=50)
    >>> ax.get_ylabel()
    'y'
    """
    import pandas as pd

    programs, seed = read_pairs(pairs), read_seed(seed)
    args, keywords = read_data(*next(iter(programs.values())), args, kwargs)
    options: Any = {"kwargs": keywords, "num_samples": num_samples, "seed": seed}
    found = {name: _predict(name, pair, args, site, options) for name, pair in programs.items()}
    first = next(iter(found.values()))
    x, order = _read_input(along, args, first)
    if data is not None and not (isinstance(data, tuple | list) and len(data) == 2):
        refuse("data", data, "two arrays, the inputs and what was observed there")
    ax = one_axes(ax, 7.0, 4.2)
    if data is not None and x is not None:
        points = [_read_numbers("data", part) for part in data]
        ax.plot(*points, ".", color=text_color(), markersize=3, alpha=0.4, label="data", zorder=1)
    places = np.arange(len(order)) if x is None else x[order]
    tables = {name: _tabulate(one, order, places) for name, one in found.items()}
    for number, ((name, table), style) in enumerate(
        zip(tables.items(), series_styles(), strict=False)
    ):
        _draw_model(ax, name, table, style, number)
    ax.set_xlabel("row, sorted by what is predicted" if x is None else "input")
    ax.set_ylabel(first.site)
    ax.set_title("bands: 90 % of the mean; thin lines: 90 % of the data", loc="left")
    ax.legend(fontsize=SMALL)
    record(ax, pd.concat(tables, names=["model", None]).reset_index("model"))
    return ax


@dataclass(frozen=True)
class _Prediction:
    """Of shape ``(num_samples, rows)``."""

    site: str
    mean: np.ndarray
    draws: np.ndarray


def _tabulate(one: _Prediction, order: np.ndarray, places: np.ndarray) -> pd.DataFrame:
    """List by row the mean, and where 90 % of the mean and of the observations lie."""
    import pandas as pd

    columns = {"input": places, "mean": one.mean.mean(0)[order]}
    for name, values in (("mean", one.mean), ("data", one.draws)):
        low, high = np.quantile(values, [0.05, 0.95], axis=0)
        columns |= {f"{name} low": low[order], f"{name} high": high[order]}
    return pd.DataFrame(columns)


def _draw_model(
    ax: Axes, name: str, table: pd.DataFrame, style: Mapping[str, Any], number: int
) -> None:
    """Draw a model by its line, marker and hatch, so that colours are not needed."""
    x, color, line = table["input"], style["color"], {"linestyle": style["linestyle"]}
    if style["hatch"]:
        fill = {"facecolor": "none", "edgecolor": color, "hatch": style["hatch"], "linewidth": 0.0}
    else:
        fill = {"facecolor": color, "alpha": 0.3, "linewidth": 0.0}
    ax.fill_between(x, table["mean low"], table["mean high"], **fill)
    step = max(1, len(table) // 8)
    ax.plot(
        x,
        table["mean"],
        color=color,
        marker=style["marker"],
        # Those of two models do not cover each other.
        markevery=(number * step // 3 % len(table), step),
        markersize=6,
        markerfacecolor="white" if style["hatch"] else color,
        linewidth=2,
        label=name,
        zorder=3,
        **line,
    )
    for edge in ("data low", "data high"):
        ax.plot(x, table[edge], color=color, linewidth=0.9, zorder=2, **line)


def _predict(
    name: str,
    pair: tuple[Any, Any],
    args: tuple[Any, ...],
    site: str | None,
    options: Mapping[str, Any],
) -> _Prediction:
    model, guide = pair
    with dry_run(model, guide), torch.no_grad():
        torch.manual_seed(options["seed"])
        held = poutine.trace(guide).get_trace(*args, **options["kwargs"])
        replayed = poutine.replay(model, trace=held)
        trace = poutine.trace(replayed).get_trace(*args, **options["kwargs"])
    kinds = sort_sites(trace, held.nodes)
    seen = (*kinds.observed, *kinds.predicted)
    chosen = site if site is not None else seen[0] if len(seen) == 1 else None
    if not (isinstance(chosen, str) and chosen in seen):
        msg = f"got site={site!r} for the model {name!r}. Expected one of {list(seen)}"
        raise ValueError(msg)
    # Where there are no targets yet, any will do: they change nothing about what is predicted.
    targets = {chosen: trace.nodes[chosen]["value"]} if chosen in kinds.predicted else {}
    draws = draw(poutine.condition(model, targets), guide, args, **options).observed[chosen]
    if draws.mean is None:
        msg = (
            f"the observation {chosen!r} of the model {name!r} has no finite mean. Expected "
            "numbers, not classes; plot_reliability draws those"
        )
        raise ValueError(msg)
    rows = draws.mean.shape[1:]
    if sum(size > 1 for size in rows) > 1:
        msg = (
            f"the observation {chosen!r} of the model {name!r} has the shape {tuple(rows)}. "
            "Expected one number per row"
        )
        raise ValueError(msg)
    mean, value = (t.detach().cpu().double().flatten(1).numpy() for t in (draws.mean, draws.draws))
    return _Prediction(chosen, mean, value)


def _read_input(
    along: Any, args: tuple[Any, ...], first: _Prediction
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return the input, if there is one, and the order to draw rows in."""
    rows = first.mean.shape[1]
    given = along
    if along is None and args and isinstance(args[0], Tensor) and args[0].numel() == rows:
        given = args[0]
    if given is None:
        return None, first.mean.mean(0).argsort()
    x = _read_numbers("along", given)
    if len(x) != rows:
        msg = f"got along= with {len(x)} numbers. Expected {rows}, one per row"
        raise ValueError(msg)
    return x, x.argsort()


def _read_numbers(option: str, value: Any) -> np.ndarray:
    """Read numbers of any kind as one row of floats."""
    (numbers, *_), _ = convert_data(None, None, (value,), None)
    if not isinstance(numbers, Tensor) or numbers.is_complex():
        refuse(option, value, "an array with a number for each row")
    return numbers.detach().cpu().double().reshape(-1).numpy()
