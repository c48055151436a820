"""Every element by its posterior mean and scale, and what criteria say of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.plots.canvas import legend_below, one_axes
from pyro_bmr.plots.posteriors import ReducedSite, choose_site, find_decision, read_sites
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, GREY, SKY, VERMILION, text_color
from pyro_bmr.results import Reduction

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_criteria(result: Reduction, site: str | None = None, ax: Axes | None = None) -> Axes:
    r"""Draw every element by its posterior mean μ and standard deviation σ, and the line ΔF = 0.

    .. math:: \Delta F = \ln \frac{\sigma}{\sigma_0} + \frac{\mu^2}{2 \sigma^2},
              \qquad \sigma_0 = \frac{1}{\sqrt{2 \pi} \, p(0)},

    so that one line separates elements of all priors, in units of :math:`\sigma_0`, the scale of a
    Gaussian prior :math:`N(0, \sigma_0^2)`. Beside it stand the lines at which SNR,
    :math:`|\mu| / \sigma`, and SPR, :math:`|\mu| + \sigma`, would have pruned as many; the latter
    only where all priors have one scale.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned.
    site : str, optional
        One whose elements to draw; all that were reduced to spikes otherwise.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        With points for what was pruned and kept, as they were before the reduction; more than 150
        pruned ones as shades of how many lie in a cell, with a bar of colours.

    Raises
    ------
    TypeError
        If ``result`` is not a reduction.
    ValueError
        If the result came from a file, the guide was trained since, the site is unknown or was not
        reduced, or nothing can be drawn.

    References
    ----------
    Beckers et al. (2022), arXiv:2210.09134, who compare these criteria.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr.reduction import reduce
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([9]).to_event(1)))
    >>> _ = guide()
    >>> plot_criteria(reduce(guide)).get_xlabel()
    'posterior mean μ'
    """
    import pandas as pd

    spiked = find_decision(result).spiked
    sites = read_sites(result)
    chosen = [choose_site(sites, site)] if site is not None else list(sites.values())
    shown = [one for one in chosen if one.name in spiked and one.prior is not None]
    if not shown:
        which = f"the site {site!r} was not" if site is not None else "no site was"
        msg = f"{which} reduced to spikes. Expected one of {sorted(spiked)}"
        raise ValueError(msg)
    site_of, loc, scale, log_prior, kept = _flat(shown)
    if not len(loc):
        msg = "every element was pruned before. Expected some to draw: pass the first reduction"
        raise ValueError(msg)
    units = torch.exp(-log_prior) / (2 * torch.pi) ** 0.5
    same = bool((units - units[0]).abs().max() <= 1e-6 * units[0])
    unit = units[0] if same else torch.ones((), device="cpu")
    if not same:
        loc, scale = loc / units, scale / units
    ax = one_axes(ax, 6.8, 4.6)
    # Room for the lines; what lies at 0 ± 0 cannot be drawn on an axis of logarithms.
    low = min(float(scale.min()) / 1.5, 0.5 * float(unit))
    high = max(float(scale.max()), float(unit)) * 1.4
    widest = 1.1 * max(float(loc.abs().max()), 0.7 * float(unit))
    _draw_points(ax, loc, scale, kept, (-widest, widest, math.log10(low), math.log10(high)))
    grid = torch.from_numpy(np.geomspace(low, high, 600))
    count = int((~kept).sum())
    inside = grid[grid <= unit]
    edge = torch.cat([inside, unit.double().reshape(1)])
    _draw_line(ax, edge, lambda s: s * (-2 * (s / unit).log()).clamp(min=0).sqrt(), "ΔF = 0")
    if 0 < count < len(loc):
        ratio = _threshold(loc.abs() / scale, count)
        _draw_line(ax, grid, lambda s: ratio * s, f"SNR = {ratio:.2g}")
        if same:
            total = _threshold(loc.abs() + scale, count)
            fitting = torch.cat([grid[grid < total], torch.tensor([total], device="cpu").double()])
            _draw_line(ax, fitting, lambda s: total - s, f"SPR = {total:.2g}")
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.set_xlim(-widest, widest)
    suffix = "" if same else " / σ₀"
    ax.set_xlabel(f"posterior mean μ{suffix}")
    ax.set_ylabel(f"posterior standard deviation σ{suffix}")
    prior = "" if same else ", in units of the prior's scale σ₀"
    names = shown[0].name if len(shown) == 1 else f"{len(shown)} sites"
    ax.set_title(f"{names}: {count:,} of {len(loc):,} pruned{prior}", loc="left")
    legend = legend_below(ax, 5)
    for handle in legend.get_lines():
        handle.set_markersize(5)
    numbers = {"mean": loc, "scale": scale, "kept": kept}
    record(ax, pd.DataFrame({"site": site_of} | {n: t.numpy() for n, t in numbers.items()}))
    return ax


_STYLES = {
    "ΔF": {"linestyle": "-", "linewidth": 2.2},
    "SNR": {"linestyle": "--", "linewidth": 1.6, "color": VERMILION},
    "SPR": {"linestyle": "-.", "linewidth": 1.6, "color": SKY},
}


def _flat(sites: list[ReducedSite]) -> tuple[pd.Categorical[str], Tensor, Tensor, Tensor, Tensor]:
    """All elements that were there and can go, and of which site each is."""
    import pandas as pd

    parts, counts = [], []
    for one in sites:
        there = one.alive & one.log_prior.isfinite() & (one.scale > 0)
        parts.append([t[there] for t in (one.loc, one.scale, one.log_prior, one.kept)])
        counts.append(int(there.sum()))
    loc, scale, log_prior, kept = (torch.cat(part) for part in zip(*parts, strict=True))
    codes = np.repeat(np.arange(len(sites)), counts)
    site_of = pd.Categorical.from_codes(codes, pd.Index([one.name for one in sites]))
    return site_of, loc, scale, log_prior, kept


def _threshold(values: Tensor, count: int) -> float:
    """Below it lie as many values as that."""
    ordered = values.sort().values
    return float(ordered[count - 1 : count + 1].mean())


def _draw_points(
    ax: Axes, loc: Tensor, scale: Tensor, kept: Tensor, extent: tuple[float, float, float, float]
) -> None:
    """Draw a point per element; of very many pruned ones, shades of how many lie in a cell."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    gone, left = int((~kept).sum()), int(kept.sum())
    if gone > _FEW:
        cells = ax.hexbin(
            *(loc[~kept], scale[~kept]),
            gridsize=(52, 26),
            extent=extent,
            yscale="log",
            bins="log",
            mincnt=1,
            cmap=LinearSegmentedColormap.from_list("shades", _SHADES),
            linewidths=0.1,
            zorder=1,
        )
        bar = ax.figure.colorbar(
            cells, ax=ax, label=f"pruned elements in a cell, {gone:,} in all", pad=0.02
        )
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.spines[:].set_visible(False)
    elif gone:
        (crosses,) = ax.plot(loc[~kept], scale[~kept], "x", color=GREY, label=f"pruned: {gone:,}")
        crosses.set_markersize(5.0)
    many = left > _MANY
    ax.plot(
        loc[kept],
        scale[kept],
        "o",
        color=BLUE,
        markeredgecolor="none" if many else "white",
        markeredgewidth=0.5,
        markersize=max(1.0, 110 / left**0.5) if many else 5.0,
        alpha=0.4 if many else 1.0,
        rasterized=many,
        label=f"kept: {left:,}",
        zorder=4,
    )


# Pruned elements from which on cells show how many there are, and kept ones for which small points
# do; and shades that stand out from white and from black.
_FEW, _MANY = 150, 2000
_SHADES = ["0.78", "0.15"]


def _draw_line(ax: Axes, scale: Tensor, loc: Callable[[Tensor], Tensor], label: str) -> None:
    """Draw a line that is symmetric in the mean."""
    right = loc(scale)
    gap = [] if right[-1] == 0 else [torch.full_like(right[:1], torch.nan)]
    style = {"color": text_color()} | _STYLES[label.split()[0]]
    ax.plot(
        torch.cat([-right, *gap, right.flip(0)]),
        torch.cat([scale, *gap, scale.flip(0)]),
        label=label,
        zorder=3,
        **style,
    )
