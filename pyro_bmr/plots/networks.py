"""A small network as a graph, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_bmr.arguments.checks import read_names
from pyro_bmr.arguments.patterns import find_names
from pyro_bmr.plots.canvas import read_labels, two_axes
from pyro_bmr.plots.posteriors import ReducedSite, choose_site, find_decision, read_sites
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, GREY, LEGEND, SMALL, VERMILION, text_color
from pyro_bmr.plots.unit_order import choose_largest, find_living, order_units
from pyro_bmr.results import Reduction

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Weights, units of a layer, and names of inputs that are not read.
_MOST_EDGES, _MOST_UNITS, _MOST_NAMES = 2_000_000, 20, 6


def plot_network(
    result: Reduction,
    sites: Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    axes: Any = None,
) -> np.ndarray:
    """Draw a small network of dense layers as a graph, before the reduction and after.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned.
    sites : sequence of str, optional
        The weights of its layers from the inputs on, of shape (outputs, inputs) as in
        `torch.nn.Linear`; all sites with two axes otherwise.
    labels : sequence of str, optional
        Names of the inputs; those of the columns of the data, if they came as a table, otherwise.
    axes : sequence of Axes, optional
        A pair to draw on; of a new figure otherwise.

    Returns
    -------
    ndarray of Axes
        Before and after: the units that lead to an output, ordered so that lines cross little;
        below, how many these are. Of more than 20 in a layer the ones with the largest weights are
        drawn. The width of a line is the size of its posterior mean, by layer; negative ones are
        dashed.

    Raises
    ------
    TypeError
        If ``result`` is not a reduction.
    ValueError
        If the result came from a file, the guide was trained since, a site is unknown, or the sites
        are no chain of layers that is small enough to draw.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr.reduction import reduce
    >>> prior = dist.Normal(0.0, 1.0).expand([5, 3]).to_event(2)
    >>> guide = AutoNormal(lambda: pyro.sample("w", prior))
    >>> _ = guide()
    >>> before, after = plot_network(reduce(guide))
    >>> len(before.collections[0].get_segments())
    15
    """
    by_name, sites = read_sites(result), read_names("sites", sites)
    if sites is None:
        chosen = [one for one in by_name.values() if one.loc.dim() == 2]
    else:
        meant = [one for name in sites for one in find_names(name, by_name) or [name]]
        chosen = [choose_site(by_name, name) for name in meant]
    _check_chain(chosen)
    sizes = [chosen[0].loc.shape[1], *(one.loc.shape[0] for one in chosen)]
    columns = find_decision(result).origin.columns
    if labels is None and len(columns) == sizes[0]:
        labels = columns
    labels = read_labels(labels, sizes[0], "one per input")
    before = _Network.read([one.loc for one in chosen], [one.alive for one in chosen])
    after = _Network.read([one.after for one in chosen], [one.kept for one in chosen])
    tallest = max(len(units) for units in before.units)
    axes = two_axes(axes, 10.0, min(5.5, max(3.4, 1.0 + 0.17 * tallest)), ncols=2)
    largest = [float(one.loc.abs().max()) or 1.0 for one in chosen]
    for ax, when, network in zip(axes, ("before", "after"), (before, after), strict=True):
        _draw(ax, network, largest, labels)
        left, total = (sum(int(m.sum()) for m in network.kept), sum(m.size for m in network.kept))
        ax.set_title(f"{when}: {left:,} of {total:,} weights", loc="left")
    for name, color, style in (("positive", BLUE, "-"), ("negative", VERMILION, "--")):
        axes[1].plot([], [], color=color, linestyle=style, label=name)
    axes[1].legend(**LEGEND, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
    record(axes, _frame(chosen, before, after))
    return axes


def _check_chain(chosen: list[ReducedSite]) -> None:
    shapes = {one.name: tuple(one.loc.shape) for one in chosen}
    rows = list(shapes.values())
    fits = all(len(shape) == 2 for shape in rows) and all(
        a[0] == b[1] for a, b in zip(rows, rows[1:], strict=False)
    )
    edges = sum(one.loc.numel() for one in chosen)
    if not rows or not fits or not 0 < edges <= _MOST_EDGES:
        msg = (
            f"got the sites {shapes}. Expected sites= to name the weights of dense layers from the "
            "inputs on, each of shape (outputs, inputs), with the outputs of one the inputs of the "
            f"next, and no more than {_MOST_EDGES:,} weights in all; plot_weights draws larger ones"
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class _Network:
    """Weights and masks of layers, and by layer of units those that are drawn, in their order."""

    weights: list[np.ndarray]
    kept: list[np.ndarray]
    living: list[np.ndarray]
    units: list[np.ndarray]

    @classmethod
    def read(cls, weights: list[Tensor], kept: list[Tensor]) -> _Network:
        values = [(one * mask).numpy() for one, mask in zip(weights, kept, strict=True)]
        masks = [mask.numpy() for mask in kept]
        living = find_living(masks)
        units = choose_largest(values, living, _MOST_UNITS)
        between = [
            mask[np.ix_(out, source)]
            for mask, source, out in zip(masks, units, units[1:], strict=False)
        ]
        order = order_units(between)
        return cls(values, masks, living, [u[o] for u, o in zip(units, order, strict=True)])


def _draw(ax: Axes, network: _Network, largest: list[float], labels: Sequence[str] | None) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba_array

    heights = [1 - (np.arange(len(units)) + 0.5) / max(1, len(units)) for units in network.units]
    for place, (weights, kept) in enumerate(zip(network.weights, network.kept, strict=True)):
        drawn = np.ix_(network.units[place + 1], network.units[place])
        out, source = kept[drawn].nonzero()
        weight = weights[drawn][out, source] / largest[place]
        # The largest come last, above the others.
        order = np.abs(weight).argsort()
        ends = np.stack([heights[place][source], heights[place + 1][out]], -1)[order]
        size, negative = np.abs(weight)[order], weight[order] < 0
        opacity = np.clip(min(0.25, 100 / max(1, len(out))) + size**1.5, 0, 0.9)
        edges = LineCollection(
            list(np.stack([np.broadcast_to([place, place + 1.0], ends.shape), ends], -1)),
            colors=to_rgba_array(list(np.where(negative, VERMILION, BLUE)), opacity),
            linestyles=[(0, (4, 1.5)) if dashed else "-" for dashed in negative],
            linewidths=0.3 + 2.5 * size,
            zorder=1,
        )
        ax.add_collection(edges)
    dot = float(np.clip(400 / max(map(len, heights)), 8, 60))
    for place, height in enumerate(heights):
        ax.scatter(np.full(len(height), place), height, s=dot, color=text_color(), zorder=2)
    if labels is not None:
        for unit, y in zip(network.units[0], heights[0], strict=True):
            ax.text(-0.05, y, labels[int(unit)], ha="right", va="center", fontsize=SMALL)
    for place, (alive, units) in enumerate(zip(network.living, network.units, strict=True)):
        gone = np.flatnonzero(~alive)
        what = "input" if place == 0 else "output" if place == len(network.kept) else "unit"
        part = f"{alive.sum():,} of " if len(gone) else ""
        lines = [f"{part}{len(alive):,} {what}{'s' if len(alive) > 1 else ''}"]
        if labels is not None and place == 0 and 0 < len(gone) <= _MOST_NAMES:
            lines.append(f"not {', '.join(labels[int(unit)] for unit in gone)}")
        if len(units) < alive.sum():
            lines.append(f"+ {alive.sum() - len(units):,} not drawn")
        text = "\n".join(lines)
        ax.text(place, -0.02, text, ha="center", va="top", fontsize=SMALL, color=GREY)
    ax.set_xlim(-0.3, len(network.kept) + 0.1)
    ax.set_ylim(0, 1)
    ax.axis("off")


def _frame(sites: list[ReducedSite], before: _Network, after: _Network) -> pd.DataFrame:
    """All weights, those that are not drawn too."""
    import pandas as pd

    parts = []
    for place, one in enumerate(sites):
        out, source = before.kept[place].nonzero()
        parts.append(
            pd.DataFrame(
                {
                    "site": one.name,
                    "unit": out,
                    "reads": source,
                    "before": before.weights[place][out, source],
                    "after": after.weights[place][out, source],
                    "kept": after.kept[place][out, source],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
