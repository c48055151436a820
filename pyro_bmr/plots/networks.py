"""A small network as a graph, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import read_names
from pyro_bmr.plots.canvas import read_labels, two_axes
from pyro_bmr.plots.posteriors import ReducedSite, choose_site, find_decision, read_sites
from pyro_bmr.plots.theme import BLUE, GREY, SMALL, VERMILION, text_color
from pyro_bmr.results import Reduction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_EDGES = 20_000


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
        Before and after. The width of an edge is the size of its posterior mean, by layer; negative
        ones are dashed. Units that lead nowhere, or that nothing leads to, are hollow.

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
        chosen = [choose_site(by_name, name) for name in sites]
    _check_chain(chosen)
    sizes = [chosen[0].loc.shape[1], *(one.loc.shape[0] for one in chosen)]
    columns = find_decision(result).origin.columns
    if labels is None and len(columns) == sizes[0]:
        labels = columns
    labels = read_labels(labels, sizes[0], "one per input")
    height = min(5.5, max(3.6, 0.16 * max(sizes)))
    axes = two_axes(axes, 10.0, height, ncols=2)
    largest = [float(one.loc.abs().max()) or 1.0 for one in chosen]
    before = [(one.loc, one.alive) for one in chosen]
    after = [(one.after, one.kept) for one in chosen]
    for ax, when, layers in zip(axes, ("before", "after"), (before, after), strict=True):
        _draw(ax, layers, sizes, largest, labels)
        left = sum(int(kept.sum()) for _, kept in layers)
        total = sum(kept.numel() for _, kept in layers)
        ax.set_title(f"{when}: {left:,} of {total:,} weights", loc="left")
    for name, color, style in (("positive", BLUE, "-"), ("negative", VERMILION, "--")):
        axes[1].plot([], [], color=color, linestyle=style, label=name)
    axes[1].legend(fontsize=SMALL, loc="lower right", frameon=False)
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


def _draw(
    ax: Axes,
    layers: list[tuple[Tensor, Tensor]],
    sizes: list[int],
    largest: list[float],
    labels: Sequence[str] | None,
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba_array

    heights = [np.linspace(1, 0, size + 2)[1:-1] for size in sizes]
    for place, (loc, kept) in enumerate(layers):
        out, source = kept.nonzero().T.numpy()
        weight = loc[out, source].numpy() / largest[place]
        # The largest come last, above the others.
        order = np.abs(weight).argsort()
        ends = np.stack([heights[place][source], heights[place + 1][out]], -1)[order]
        size, negative = np.abs(weight)[order], weight[order] < 0
        opacity = np.clip(min(0.25, 100 / max(1, kept.numel())) + size**1.5, 0, 0.9)
        edges = LineCollection(
            list(np.stack([np.broadcast_to([place, place + 1.0], ends.shape), ends], -1)),
            colors=to_rgba_array(list(np.where(negative, VERMILION, BLUE)), opacity),
            linestyles=[(0, (4, 1.5)) if dashed else "-" for dashed in negative],
            linewidths=0.3 + 2.5 * size,
            zorder=1,
        )
        ax.add_collection(edges)
    dot = float(np.clip(400 / max(sizes), 4, 60))
    for place, used in enumerate(_used(layers, sizes)):
        for chosen, face in ((used, text_color()), (~used, "none")):
            shown = heights[place][chosen]
            edge = text_color() if face != "none" else GREY
            x = np.full(len(shown), place)
            ax.scatter(x, shown, s=dot, facecolor=face, edgecolor=edge, linewidth=0.8, zorder=2)
    if labels is not None:
        for label, y in zip(labels, heights[0], strict=True):
            ax.text(-0.05, y, label, ha="right", va="center", fontsize=SMALL)
    ax.set_xlim(-0.3, len(layers) + 0.1)
    ax.set_ylim(0, 1)
    ax.axis("off")


def _used(layers: list[tuple[Tensor, Tensor]], sizes: list[int]) -> list[np.ndarray]:
    """By layer of units, those that lie on a way from an input, or a bias, to an output."""
    needed = [torch.ones(sizes[-1], dtype=torch.bool, device="cpu")]
    for _, kept in reversed(layers):
        needed.insert(0, (kept & needed[0][:, None]).any(0))
    return [units.numpy() for units in needed]
