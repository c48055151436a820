"""The weights of a site as a matrix, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.plots.canvas import read_labels, two_axes
from pyro_bmr.plots.posteriors import ReducedSite, choose_site, name_columns, read_sites
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import SMALL
from pyro_bmr.results import Reduction

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Names along an axis, and elements of which the negative ones are marked.
_MOST_LABELS, _MOST_MARKS = 30, 250


def plot_weights(
    result: Reduction,
    site: str | None = None,
    *,
    reader: str | None = None,
    labels: Sequence[str] | None = None,
    axes: Any = None,
) -> np.ndarray:
    """Draw the posterior means of a site as a matrix before the reduction, and one after.

    The entries of the first axis, the units that a `torch.nn.Linear` computes, are sorted by how
    many of their weights stay; both matrices have this order and one scale of colours, and the
    ticks are the indices in the site. Axes after the first are laid side by side: of a convolution,
    each filter in one line. A site of one axis keeps its order.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned. After further training its matrix is the one after.
    site : str, optional
        Which site; the largest one that was reduced otherwise.
    reader : str, optional
        The site of weights that read these units along its second axis. Units of which all these
        are pruned come last, right of a dashed line.
    labels : sequence of str, optional
        Names along the second axis, such as the inputs of a first layer, or along the only one.
        Those of the columns of the data otherwise, if they came as a table and only this axis has
        as many entries.
    axes : sequence of Axes, optional
        A pair to draw on; of a new figure otherwise.

    Returns
    -------
    ndarray of Axes
        Before and after; pruned elements are grey and hatched. Where they are few, dashes mark the
        negative ones, which in grey look like positive ones.

    Raises
    ------
    TypeError
        If ``result`` is not a reduction.
    ValueError
        If the result came from a file, the guide was trained since, a site is unknown, or
        ``labels`` or ``reader`` do not fit.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr.reduction import reduce
    >>> prior = dist.Normal(0.0, 1.0).expand([5, 3]).to_event(2)
    >>> guide = AutoNormal(lambda: pyro.sample("w", prior))
    >>> _ = guide()
    >>> before, after = plot_weights(reduce(guide), "w", labels=["a", "b", "c"])
    >>> before.get_title(loc="left")
    'w before'
    """
    sites = read_sites(result)
    one = choose_site(sites, site) if site is not None else _largest(sites)
    masks = {"before": _matrix(one.alive), "after": _matrix(one.kept)}
    values = {"before": _matrix(one.loc), "after": _matrix(one.after)}
    units, others = values["before"].shape
    axis, columns = name_columns(result, sites).get(one.name, (None, ()))
    flat = one.loc.dim() < 2
    if labels is None and axis == (0 if flat else 1):
        labels = columns
    place = f" for the site {one.name!r} of shape {tuple(one.loc.shape)}"
    expected = f"one per entry of its {'only' if flat else 'second'} axis"
    labels = read_labels(labels, units if flat else others, expected, place)
    everything = torch.ones(units, dtype=torch.bool, device="cpu")
    read = everything if reader is None else _is_read(sites, reader, units)
    kept = torch.zeros_like(read, dtype=torch.int64) if flat else masks["after"].sum(1)
    order = (kept + (others + 1) * read).argsort(descending=True, stable=True)
    sorting = "index" if flat else "index along the first axis,\nsorted by weights kept"
    wide = units >= others
    axes = two_axes(axes, 8.0, 5.2, nrows=2, sharex=True, sharey=True)
    marked = False
    limit, clipped = _color_limit(torch.cat(list(values.values())))
    for ax, when in zip(axes, values, strict=True):
        shown = torch.where(masks[when], values[when], torch.nan)[order]
        image = ax.imshow(
            (shown.T if wide else shown).numpy(),
            cmap="RdBu",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
        )
        ax.patch.set(facecolor="0.8", edgecolor="0.65", hatch="////")
        along, across = (ax.xaxis, ax.yaxis) if wide else (ax.yaxis, ax.xaxis)
        _label_units(along, order, labels if flat else None)
        name = "second axis" if wide or ax is axes[-1] else ""
        _label(across, name, others, None if flat else labels)
        if not wide:
            ax.set_ylabel(sorting)
        gone = 1 - float(masks[when].double().mean()) if masks[when].numel() else 0.0
        ax.set_title(
            f"{one.name} {when}{f': {gone:.1%} pruned (grey)' if gone else ''}", loc="left"
        )
        if not read.all():
            line = ax.axvline if wide else ax.axhline
            line(int(read.sum()) - 0.5, color="black", linewidth=1, linestyle="--")
        marked |= _mark_negative(ax, shown.T if wide else shown)
    notes = [sorting.replace("\n", " ")] if wide else [axes[-1].get_xlabel()]
    if not read.all():
        where = "beyond" if wide else "below"
        notes.append(f"{where} the line: {reader} prunes all that reads them")
    axes[-1].set_xlabel(";\n".join(filter(None, notes)))
    bar = axes[0].figure.colorbar(image, ax=list(axes), extend="both" if clipped else "neither")
    bar.set_label(f"posterior mean{'; a white dash: negative' if marked else ''}")
    record(axes, _frame(one))
    return axes


def _largest(sites: dict[str, ReducedSite]) -> ReducedSite:
    reduced = [one for one in sites.values() if one.prior is not None]
    if not reduced:
        msg = f"no site was reduced. Expected site= to name one of {sorted(sites)}"
        raise ValueError(msg)
    return max(reduced, key=lambda one: one.loc.numel())


def _matrix(values: Tensor) -> Tensor:
    if values.dim() < 2:
        return values.reshape(-1, 1)
    return values.flatten(1)


def _is_read(sites: dict[str, ReducedSite], reader: str, units: int) -> Tensor:
    kept = choose_site(sites, reader).kept
    if kept.dim() < 2 or kept.shape[1] != units:
        msg = (
            f"got reader={reader!r} of shape {tuple(kept.shape)}. Expected a site whose "
            f"second axis has the {units} units"
        )
        raise ValueError(msg)
    return kept.transpose(0, 1).flatten(1).any(1)


def _mark_negative(ax: Axes, shown: Tensor) -> bool:
    across, along = (shown < 0).nonzero().T.numpy()
    few = int(shown.isfinite().sum()) <= _MOST_MARKS and len(across) > 0
    if few:
        ax.plot(along, across, "_", color="white", markersize=6, markeredgewidth=1.4)
    return few


def _frame(one: ReducedSite) -> pd.DataFrame:
    """All elements, by their place in the site."""
    import pandas as pd

    places = pd.MultiIndex.from_product(
        [range(size) for size in one.loc.shape] or [range(1)],
        names=[f"axis {axis}" for axis in range(max(1, one.loc.dim()))],
    )
    columns = {"before": one.loc, "after": one.after, "alive": one.alive, "kept": one.kept}
    flat = {name: values.reshape(-1).numpy() for name, values in columns.items()}
    return pd.DataFrame(flat, index=places)


def _color_limit(values: Tensor) -> tuple[float, bool]:
    """Of large matrices the few largest weights do not make all others pale."""
    sizes = values.abs().reshape(-1)
    most = float(sizes.max()) if len(sizes) else 1.0
    limit = float(np.quantile(sizes.numpy(), 0.999)) if len(sizes) > 5000 else most
    return limit or 1.0, limit < most


def _label_units(axis: Any, order: Tensor, labels: Sequence[str] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    indices, size = order.tolist(), len(order)
    if labels is not None:
        _label(axis, "", size, [labels[index] for index in indices])
    elif size <= _MOST_LABELS:
        axis.set_ticks(range(size), indices)
    else:
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_major_formatter(lambda at, _: str(indices[int(at)]) if 0 <= at < size else "")


def _label(axis: Any, name: str, size: int, labels: Sequence[str] | None) -> None:
    axis.set_label_text(name)
    if labels is not None and size <= _MOST_LABELS:
        axis.set_ticks(range(size), labels, fontsize=SMALL)
        axis.set_label_text("")
    elif size == 1:
        axis.set_ticks([])
        axis.set_label_text("")
