"""One element: its prior, its posterior, and what the reduction made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Normal

from pyro_bmr.arguments.checks import show
from pyro_bmr.factors.switched import SwitchedFactor
from pyro_bmr.mathematics.gaussian import Diagonal
from pyro_bmr.mathematics.reduced_priors import Gaussian, Laplace
from pyro_bmr.plots.canvas import one_axes, signed
from pyro_bmr.plots.posteriors import (
    ReducedSite,
    choose_site,
    find_decision,
    name_columns,
    read_sites,
)
from pyro_bmr.plots.sources import record
from pyro_bmr.plots.theme import BLUE, GREY, LEGEND, SKY, VERMILION, text_color
from pyro_bmr.programs.distributions import find_element_support
from pyro_bmr.programs.model_runs import ModelRuns
from pyro_bmr.programs.sites import Site
from pyro_bmr.results import Reduction
from pyro_bmr.selection.decision import Decision

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_element(
    result: Reduction, site: str, index: int | Sequence[int] = (), ax: Axes | None = None
) -> Axes:
    r"""Draw the prior, the posterior and the reduced posterior of one element.

    .. math:: \Delta F = \ln p(\theta = 0) - \ln q(\theta = 0),

    which is, on an axis of logarithms, how far the prior at zero lies above the posterior: below,
    and the element is better off at zero. In unconstrained coordinates.

    Parameters
    ----------
    result : Reduction
        What `reduce` returned.
    site : str
        A site that was reduced.
    index : int or sequence of int
        Of the element; none for a scalar.
    ax : Axes, optional
        To draw on; of a new figure otherwise.

    Returns
    -------
    Axes
        With densities on a logarithmic axis, and an arrow from q(0) to p(0).

    Raises
    ------
    TypeError
        If ``result`` is not a reduction.
    ValueError
        If the result came from a file, the guide was trained since, the site is unknown or was left
        whole, the index does not fit, or the element was pruned before.

    References
    ----------
    Dickey (1971), Ann. Math. Statist. 42(1).

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr.reduction import reduce
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> plot_element(reduce(guide), "w").get_ylabel()
    'density'
    """
    import pandas as pd

    decision = find_decision(result)
    sites = read_sites(result)
    one = choose_site(sites, site)
    place = _check_place(one, index)
    element = Normal(one.loc[place], one.scale[place])
    at_zero = {
        "p(0)": float(one.log_prior[place]),
        "q(0)": float(element.log_prob(torch.zeros_like(element.loc))),
    }
    heights = {name: math.exp(value) for name, value in at_zero.items()}
    dropped = not bool(decision.masks[site][place])
    spike = dropped and site in decision.spiked
    prior_scale = 1 / (heights["p(0)"] * (2 * torch.pi) ** 0.5)
    grid = _grid(element, prior_scale)
    curves = {
        "prior p": _prior_density(decision, one, place, grid),
        "posterior q": element.log_prob(grid).exp(),
        "reduced prior": _reduced_prior_density(one, place, grid) if dropped else None,
        "reduced posterior": None if spike else _reduced_posterior(decision, one, place, grid),
    }
    names = {name: name for name in curves}
    if curves["reduced posterior"] is not None and torch.allclose(
        curves["reduced posterior"], curves["posterior q"], rtol=1e-4
    ):
        names["posterior q"] = "posterior q, also reduced"
        curves["reduced posterior"] = None
    ax = one_axes(ax, 7.6, 3.8)
    for name, density in curves.items():
        if density is not None:
            ax.plot(grid, density, label=names[name], **_STYLES[name])
    top = max(float(density.max()) for density in curves.values() if density is not None)
    # Not further down than can be seen: the arrow then goes to the edge.
    low, high = max(0.05 * min(*heights.values(), top), 1e-7 * top), 8 * top
    ax.set(yscale="log", ylim=(low, high), xlim=_shown(element, prior_scale))
    if spike:
        _draw_arrow(ax, 1.6 * top, high / 1.2, VERMILION)
        ax.plot([], [], color=VERMILION, marker="^", label="reduced posterior: spike at 0")
    if site in decision.spiked:
        _draw_heights(ax, at_zero, low)
    constrained = find_element_support(_site(one).support) is not constraints.real
    ax.set_xlabel(f"{site}, unconstrained" if constrained else "θ")
    ax.set_ylabel("density")
    fate = "kept" if not dropped else "pruned" if spike else "takes the reduced prior"
    axis, columns = name_columns(result, sites).get(site, (None, ()))
    told = [columns[i] if along == axis else str(i) for along, i in enumerate(place)]
    name = f"{site}[{', '.join(told)}]" if place else site
    delta_f = float(result.scores[site][place])
    ax.set_title(f"{name}: ΔF = {signed(delta_f)} nats, {fate}", loc="left")
    ax.legend(**LEGEND, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)
    shown = {name: density.numpy() for name, density in curves.items() if density is not None}
    record(ax, pd.DataFrame({"theta": grid.numpy()} | shown))
    return ax


_STYLES: dict[str, dict[str, Any]] = {
    "prior p": {"color": GREY, "linestyle": "--", "linewidth": 2},
    "posterior q": {"color": BLUE, "linestyle": "-", "linewidth": 2.2},
    "reduced prior": {"color": SKY, "linestyle": "-.", "linewidth": 2},
    "reduced posterior": {"color": VERMILION, "linestyle": ":", "linewidth": 2.6},
}


def _check_place(one: ReducedSite, index: int | Sequence[int]) -> tuple[int, ...]:
    if one.prior is None:
        msg = f"the site {one.name!r} was left whole. Expected one that was reduced"
        raise ValueError(msg)
    shape = tuple(one.loc.shape)
    place = tuple(index) if isinstance(index, tuple | list | torch.Size) else (index,)
    if len(place) != len(shape) or not all(
        isinstance(i, int | np.integer) and -size <= i < size
        for i, size in zip(place, shape, strict=True)
    ):
        msg = (
            f"got index={show(index)} for the site {one.name!r} of shape {shape}. Expected "
            f"{len(shape)} integers within it"
        )
        raise ValueError(msg)
    place = tuple(map(int, place))
    if not one.alive[place]:
        msg = (
            f"the element {index!r} of the site {one.name!r} was pruned before. Expected one that "
            "was not, or the first reduction"
        )
        raise ValueError(msg)
    if not one.log_prior[place].isfinite():
        msg = (
            f"the element {index!r} of the site {one.name!r} has no finite prior density at zero. "
            "Expected one that can go"
        )
        raise ValueError(msg)
    return place


def _grid(element: Normal, prior_scale: float) -> Tensor:
    """Where both densities are, and beyond what is shown, with zero among the points."""
    loc, scale = float(element.loc), float(element.scale)
    wide = torch.linspace(-8 * prior_scale, 8 * prior_scale, 401, dtype=torch.float64, device="cpu")
    near = torch.linspace(loc - 6 * scale, loc + 6 * scale, 201, dtype=torch.float64, device="cpu")
    return torch.cat([wide, near, torch.zeros(1, dtype=torch.float64, device="cpu")]).unique()


def _shown(element: Normal, prior_scale: float) -> tuple[float, float]:
    loc, scale = float(element.loc), float(element.scale)
    return min(-2.5 * prior_scale, loc - 5 * scale), max(2.5 * prior_scale, loc + 5 * scale)


def _prior_density(
    decision: Decision, one: ReducedSite, place: tuple[int, ...], grid: Tensor
) -> Tensor | None:
    """Return the prior's density, None where only its value at zero is known."""
    gaussian = _marginal(one)
    if gaussian is not None:
        loc, scale = (t.cpu().expand(one.loc.shape)[place] for t in (gaussian.loc, gaussian.scale))
        shape = Normal(loc, scale).log_prob(grid) - Normal(loc, scale).log_prob(0 * grid[:1])
        return (one.log_prior[place] + shape).exp()
    site = _site(one)
    if find_element_support(site.support) is not constraints.real:
        return None
    origin: Any = decision.origin
    locations = {
        site.name: (site, loc)
        for factor in decision.factors
        for site, loc in zip(factor.sites, factor.locations().values(), strict=True)
    }
    with ModelRuns(origin.model, origin.args, origin.kwargs, locations).elsewhere() as run:
        prior = run({})[one.name]["fn"]
    if prior.shape() != one.loc.shape:  # some rows of a plate
        return None
    # Of independent elements, all others cancel in the difference.
    value = torch.zeros_like(locations[one.name][1], dtype=torch.float64)
    at_zero = prior.log_prob(value).sum()
    shape = []
    for point in grid:
        value[place] = float(point)
        shape.append(float(prior.log_prob(value).sum() - at_zero))
    return (one.log_prior[place] + torch.tensor(shape, dtype=torch.float64, device="cpu")).exp()


def _marginal(one: ReducedSite) -> Diagonal | None:
    """Return the Gaussian prior of each element by itself, if it is Gaussian."""
    if one.prior is None or one.prior.joint is None:
        return None if one.prior is None else one.prior.gaussian
    joint = one.prior.joint
    scale = joint.covariance.diagonal().sqrt()
    return Diagonal(joint.loc.reshape(one.loc.shape), scale.reshape(one.loc.shape))


def _reduced_prior_density(one: ReducedSite, place: tuple[int, ...], grid: Tensor) -> Tensor | None:
    reduced = one.factor.reduced.get(one.name) if isinstance(one.factor, SwitchedFactor) else None
    if reduced is None:
        return None
    parameters = {
        name: torch.as_tensor(value, device="cpu").detach().double().expand(one.loc.shape)[place]
        for name, value in vars(reduced).items()
    }
    return _REDUCED[type(reduced)](parameters).log_prob(grid).exp()


_REDUCED: dict[type, Callable[[dict[str, Tensor]], Any]] = {
    Gaussian: lambda of: Normal(of["loc"], of["scale"]),
    Laplace: lambda of: torch.distributions.Laplace(torch.zeros_like(of["scale"]), of["scale"]),
}


def _reduced_posterior(
    decision: Decision, one: ReducedSite, place: tuple[int, ...], grid: Tensor
) -> Tensor:
    masks = {s.name: decision.masks[s.name] for s in one.factor.sites if s.name in decision.masks}
    marginal = one.factor.prune(masks).marginals()[one.name]
    loc, scale = (t[place].detach().cpu().double() for t in (marginal.loc, marginal.scale))
    return Normal(loc, scale).log_prob(grid).exp()


def _site(one: ReducedSite) -> Site:
    return next(site for site in one.factor.sites if site.name == one.name)


def _draw_heights(ax: Axes, at_zero: Mapping[str, float], low: float) -> None:
    """Mark both densities at zero, and the distance between them."""
    p, q = (math.exp(value) for value in at_zero.values())
    _draw_arrow(ax, max(q, low), p, text_color())
    for (name, value), marker in zip(at_zero.items(), "sD", strict=True):
        label = f"{name} = {math.exp(value):.3g}" if value > -7 else f"ln {name} = −{-value:,.1f}"
        ax.plot(
            [0], [math.exp(value)], marker, color=text_color(), markersize=5, label=label, zorder=5
        )
    ax.plot([], [], color=text_color(), label="ΔF = ln p(0) − ln q(0)")
    if abs(at_zero["p(0)"] - at_zero["q(0)"]) > 0.5:
        middle = (0, math.sqrt(p * max(q, low)))
        ax.annotate("ΔF", middle, (8, 0), textcoords="offset points", va="center", weight="bold")


def _draw_arrow(ax: Axes, start: float, end: float, color: Any) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (0, end), (0, start), arrowprops=style, zorder=4)
