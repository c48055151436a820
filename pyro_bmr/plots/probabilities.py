"""How probable it is that each element is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, refuse
from pyro_bmr.averaging.presence import Presence
from pyro_bmr.moments.names import Layout
from pyro_bmr.plots.canvas import legend_below, one_axes, read_labels, set_rows, write_right
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, SMALL, VERMILION, text_color

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_presence(
    found: Presence, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the posterior probability that each element is there, rather than exactly zero.

    Up to 40 elements have a bar each; of more, every site has one, shaded by how many of its
    elements are how probable.

    Parameters
    ----------
    found : Presence
        What `presence` returned.
    labels : sequence of str, optional
        Names of the elements, where each has a bar; such as ``w[0]`` otherwise.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        With a bar per element, the prior probability as a diamond and two Monte Carlo standard
        errors where there are some; or with one stacked bar per site.

    Raises
    ------
    TypeError
        If ``found`` is not what `presence` returned.
    ValueError
        If there are no elements, or not as many ``labels``.

    Examples
    --------
    >>> found = Presence({"w": torch.tensor([0.25, 0.75])}, {}, {"w": 0.0})
    >>> [float(bar.get_width()) for bar in plot_presence(found).patches]
    [0.25, 0.75]
    """
    check_kind("found", found, Presence, "what pyro_bmr.presence() returned")
    total = sum(p.numel() for p in found.probability.values())
    if not total:
        refuse("found", found, "one or more elements: a guide with sites that can be reduced")
    table = _tabulate(found)
    each = total <= _FEW
    labels = read_labels(labels, total if each else 0, "one per element where each has a bar")
    rows = list(labels or _name(found)) if each else list(found.probability)
    ax = one_axes(ax, 6.4 + 0.07 * max(map(len, rows)), 1.3 + (0.24 if each else 0.34) * len(rows))
    (_draw_elements if each else _draw_sites)(ax, table)
    set_rows(ax, rows, SMALL if each else None)
    expected = f"{found.expected_kept:,.1f} of {total:,} elements expected to be there"
    ax.set_title(expected, loc="left")
    legend_below(ax, 4)
    record(ax, table)
    return ax


# Elements that have a bar each; and the parts of a site's bar, from improbable to certain.
_FEW = 40
_BOUNDS = (0.0, 0.05, 0.5, 0.95, 1.0)
_SHADES = ("#FFFFFF", "#C6D9E7", "#6FA3C7", BLUE)


def _tabulate(found: Presence) -> pd.DataFrame:
    import pandas as pd

    parts = []
    for name, probability in found.probability.items():
        size = probability.numel()
        error = found.standard_error.get(name, torch.zeros_like(probability))
        odds = torch.as_tensor(found.log_odds[name], dtype=torch.float64, device="cpu")
        prior = odds.cpu().sigmoid().expand(probability.shape)
        columns = {"probability": probability, "prior": prior, "standard_error": error}
        numbers = {what: _flat(values) for what, values in columns.items()}
        parts.append(pd.DataFrame({"site": [name] * size, "element": range(size)} | numbers))
    return pd.concat(parts, ignore_index=True)


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().reshape(-1).numpy()


def _name(found: Presence) -> tuple[str, ...]:
    return Layout({name: p.shape for name, p in found.probability.items()}, {}).elements()


def _draw_elements(ax: Axes, table: pd.DataFrame) -> None:
    places = np.arange(len(table))
    errors = 2 * table["standard_error"]
    ax.barh(
        places,
        table["probability"],
        xerr=errors if errors.any() else None,
        color=BLUE,
        height=0.62,
        ecolor=text_color(),
        label="after the data" + (" (± 2 s.e.)" if errors.any() else ""),
    )
    for place, value in enumerate(table["probability"]):
        write_right(ax, place, f"{value:.2f}")
    (points,) = ax.plot(table["prior"], places, "D", color=VERMILION, label="before")
    points.set(markersize=5, markeredgecolor="white")
    ax.axvline(0.5, color=text_color(), linestyle=":", linewidth=1.0, zorder=0)
    ax.set(xlim=(0, 1), xlabel="probability that it is there")


def _draw_sites(ax: Axes, table: pd.DataFrame) -> None:
    """Stack the shares of elements from certain ones on the left to improbable ones."""
    groups = list(table.groupby("site", sort=False)["probability"])
    for place, (_, values) in enumerate(groups):
        shares = np.histogram(values, _BOUNDS)[0][::-1] / len(values)
        starts = np.concatenate([[0.0], shares.cumsum()[:-1]])
        for share, start, shade in zip(shares, starts, _SHADES[::-1], strict=True):
            (bar,) = ax.barh([place], [100 * share], left=100 * start, height=0.62, color=shade)
            bar.set(edgecolor=text_color(), linewidth=0.5)
        write_right(ax, place, f"{values.sum():,.1f} of {len(values):,}")
    for low, high, shade in list(zip(_BOUNDS, _BOUNDS[1:], _SHADES, strict=False))[::-1]:
        label = f"P > {low:g}" if high == 1 else f"{low:g} to {high:g}" if low else f"P < {high:g}"
        ax.bar([0], [0], color=shade, edgecolor=text_color(), linewidth=0.5, label=label)
    ax.set(xlim=(0, 100), xlabel="elements (%)")
