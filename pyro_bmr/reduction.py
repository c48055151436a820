"""`reduce` and the `Reduction` that it returns: the face of the package."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.factors import Factor, Prior
from pyro_bmr.groups import elements
from pyro_bmr.guides import read_guide, read_origin
from pyro_bmr.handlers import PrunedModel
from pyro_bmr.priors import Spike
from pyro_bmr.pruned_guide import PrunedGuide
from pyro_bmr.rendering import render
from pyro_bmr.scores import Scores, score
from pyro_bmr.selection import Selection, by_evidence
from pyro_bmr.site_priors import read_priors


@torch.inference_mode(False)
@torch.no_grad()
def reduce(
    guide: Any,
    *,
    model: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    sites: Iterable[str] | None = None,
    groups: Callable[[str, torch.Size], Tensor | None] = elements,
    select: Selection = by_evidence(),
    reduced_prior: Spike = Spike(),
) -> Reduction:
    r"""Reduce a trained guide: score every nested sparse prior, and prune what is not worth it.

    .. math:: \Delta F = \ln p(\theta_S = 0) - \ln q(\theta_S = 0)

    is, without any refitting, the change of the free energy when the prior of a set :math:`S` of
    weights becomes a point mass at zero. Negative is better.

    The guide, the param store and the random number generators are left as they were. The model is
    run once, at the posterior's location, to read its priors.

    Parameters
    ----------
    guide : callable
        A guide trained by SVI: ``AutoNormal``, ``AutoDiagonalNormal``,
        ``AutoMultivariateNormal``, ``AutoGuideList`` of these, or the guide of a reduction.
    model : callable, optional
        The model that the guide was trained for, if the guide does not know it.
    args, kwargs : optional
        Arguments to run the model with; those of the guide's first call otherwise.
    sites : iterable of str, optional
        Sample sites to reduce; all that can be otherwise.
    groups : callable
        What lives or dies together; `elements` is all that there is so far.
    select : callable
        What to drop: `by_evidence`, `top_k`, `snr`, `spr`, `magnitude`, `random`, or any function
        from `Scores` to a mask a site, True for what is kept.
    reduced_prior : Spike
        The prior of what is dropped.

    Returns
    -------
    Reduction
        The pruned model and guide, with the scores and the masks.

    Raises
    ------
    TypeError
        If the guide's family, ``select``, ``groups`` or ``reduced_prior`` is not known.
    ValueError
        If the guide was never called or is not finite, if a named site cannot be reduced, or if
        ``select`` returns a mask that does not fit.

    References
    ----------
    Beckers et al. (2022), "Principled Pruning of Bayesian Neural Networks through Variational
    Free Energy Minimization", arXiv:2210.09134; Friston, Parr & Zeidman (2018), arXiv:1805.07092.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    >>> start = init_to_value(values={"w": torch.tensor([0.0, 3.0])})
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)
    >>> _ = guide()
    >>> result = reduce(guide)
    >>> result.masks["w"], round(result.delta_f, 3)
    (tensor([False,  True]), -0.693)
    """
    _check_options(select, groups, reduced_prior)
    factors = read_guide(guide)
    origin = read_origin(guide)
    full_model = _known(origin.model if model is None else model, guide)
    if args or kwargs:
        origin = replace(origin, args=tuple(args), kwargs=dict(kwargs or {}))
    origin = replace(origin, model=full_model)
    priors, reasons = read_priors(full_model, origin.args, origin.kwargs, factors, sites)
    if not priors:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"no site of this guide can be reduced ({listed})", stacklevel=3)
    scores = score(tuple(factor.with_priors(priors) for factor in factors))
    chosen = _checked(select, scores)
    pruned = tuple(factor.prune(chosen) for factor in scores.factors)
    masks = _masks(pruned, scores)
    return Reduction(
        model=PrunedModel(full_model, masks),
        guide=PrunedGuide(pruned, origin),
        masks=masks,
        scores=scores.delta_f,
        sites=_summarize(scores, chosen, pruned, reasons),
    )


@dataclass(frozen=True)
class SiteSummary:
    """What a reduction did to one sample site.

    Parameters
    ----------
    name : str
        The site.
    shape : tuple of int
        Its shape, at the full size of its plates.
    kept : int
        How many elements stay.
    delta_f : float
        Its part in the joint ΔF, in nats: the parts of all sites add up to the whole.
    note : str
        Why it was left whole, or which elements could not be scored.

    Examples
    --------
    >>> SiteSummary("w", (2, 3), kept=2, delta_f=-1.0).total
    6
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    delta_f: float
    note: str = ""

    @property
    def total(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, eq=False)
class Reduction:
    """A pruned model and guide, and what was found on the way.

    Parameters
    ----------
    model : PrunedModel
        The model under masks: same sites and shapes, pruned elements exactly 0.
    guide : PrunedGuide
        The posterior given that the pruned elements are 0, ready for `pyro.infer.Predictive` and
        for further training.
    masks : mapping
        By site, a boolean tensor, True where kept; sites left whole are absent.
    scores : mapping
        By site, ΔF in nats of dropping each element by itself.
    sites : tuple of SiteSummary
        A row a site, those left whole with their reason.

    Examples
    --------
    >>> Reduction(None, None, {}, {}, (SiteSummary("w", (4,), 1, -2.5),)).sparsity
    0.75
    """

    model: PrunedModel
    guide: PrunedGuide
    masks: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    sites: tuple[SiteSummary, ...]

    @property
    def delta_f(self) -> float:
        """Joint ΔF in nats of all that was dropped; negative means lower free energy."""
        return sum(site.delta_f for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Fraction of all elements of the guide that are pruned, here and before."""
        total = sum(site.total for site in self.sites)
        return 1.0 - sum(site.kept for site in self.sites) / total if total else 0.0

    def summary(self) -> pd.DataFrame:
        """Return a table with a row a site.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``shape``, ``total``, ``kept``, ``pruned %``, ``delta_f``
            (nats) and ``note``.
        """
        rows = [
            {
                "site": site.name,
                "shape": site.shape,
                "total": site.total,
                "kept": site.kept,
                "pruned %": 100 * (1 - site.kept / site.total) if site.total else 0.0,
                "delta_f": site.delta_f,
                "note": site.note,
            }
            for site in self.sites
        ]
        return pd.DataFrame(rows).set_index("site")

    def to(self, device: torch.device | str) -> Reduction:
        """Move to a device.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        Reduction
            With masks and scores there. Model and guide are moved in place, as in torch.
        """
        return replace(
            self,
            model=self.model.to(device),
            guide=self.guide.to(device),
            masks={name: mask.to(device) for name, mask in self.masks.items()},
            scores={name: scores.to(device) for name, scores in self.scores.items()},
        )

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.sparsity:.1%} pruned, ΔF = {self.delta_f:+.2f} nats", title_justify="left"
        )
        table.add_column("site")
        for column in ("shape", "total", "kept", "pruned", "ΔF (nats)"):
            table.add_column(column, justify="right")
        table.add_column("note")
        for site in self.sites:
            table.add_row(
                site.name,
                " × ".join(map(str, site.shape)),
                f"{site.total:,}",
                f"{site.kept:,}",
                f"{1 - site.kept / site.total:.1%}" if site.total else "",
                f"{site.delta_f:+.2f}" if site.kept < site.total else "",
                site.note,
            )
        return table

    def __str__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        table = self.summary().round({"pruned %": 1, "delta_f": 2})
        return f"<p>{self.sparsity:.1%} pruned, ΔF = {self.delta_f:+.2f} nats</p>{table.to_html()}"


def _check_options(select: Any, groups: Any, reduced_prior: Any) -> None:
    if not callable(select):
        msg = f"got select={select!r}. Expected a selection, such as pyro_bmr.by_evidence()"
        raise TypeError(msg)
    if groups is not elements:
        msg = f"got groups={groups!r}. Expected pyro_bmr.elements, the only grouping so far"
        raise TypeError(msg)
    if not isinstance(reduced_prior, Spike):
        msg = (
            f"got reduced_prior={reduced_prior!r}. Expected pyro_bmr.Spike(), the only reduced "
            "prior that reduce knows so far; pyro_bmr.delta_f scores Gaussian ones"
        )
        raise TypeError(msg)


def _known(model: Callable[..., Any] | None, guide: Any) -> Callable[..., Any]:
    if model is None:
        msg = (
            f"this {type(guide).__name__} does not know its model; copy.deepcopy and torch.save "
            "take it away from Pyro's autoguides, from the copy and from the original. Pass the "
            "model: reduce(guide, model=model)"
        )
        raise ValueError(msg)
    return model


def _checked(select: Selection, scores: Scores) -> dict[str, Tensor]:
    """Select, check the masks that come back, and complete them."""
    masks = select(scores)
    if not isinstance(masks, Mapping):
        msg = (
            f"select returned a {type(masks).__name__}. Expected a function from scores to a "
            "mapping of site names to masks; those of this package are called first, as in "
            "select=by_evidence()"
        )
        raise TypeError(msg)
    unknown = sorted(set(masks) - set(scores.delta_f))
    if unknown:
        msg = (
            f"select returned masks for {unknown}. Expected only sites that can be reduced: "
            f"{sorted(scores.delta_f)}"
        )
        raise ValueError(msg)
    checked = {}
    for name, kept in scores.kept.items():
        mask = masks.get(name, kept)
        if mask.dtype != torch.bool or mask.shape != kept.shape:
            msg = (
                f"select returned a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for "
                f"the site {name!r}. Expected a torch.bool tensor of shape {tuple(kept.shape)}, "
                "True for what is kept"
            )
            raise ValueError(msg)
        if scores.unscored[name] and (~mask & scores.delta_f[name].isposinf()).any():
            msg = (
                f"select drops elements of the site {name!r} that have no prior density at zero; "
                f"{scores.unscored[name]} of its elements have none. Expected a mask that keeps "
                "those whose delta_f is inf"
            )
            raise ValueError(msg)
        checked[name] = mask.contiguous()
    return checked


def _summarize(
    scores: Scores,
    chosen: Mapping[str, Tensor],
    pruned: tuple[Factor, ...],
    reasons: Mapping[str, str],
) -> tuple[SiteSummary, ...]:
    rows = []
    for before, after in zip(scores.factors, pruned, strict=True):
        delta_f = before.delta_f(scores.delta_f, chosen)
        kept = after.kept()
        rows += [
            SiteSummary(
                site.name,
                tuple(site.shape),
                int(kept[site.name].count_nonzero()),
                delta_f.get(site.name, 0.0),
                _note(site.name, before.priors, reasons),
            )
            for site in before.sites
        ]
    held = {row.name for row in rows}
    absent = [
        SiteSummary(n, (0,), 0, 0.0, f"not reduced: {r}")
        for n, r in reasons.items()
        if n not in held
    ]
    return tuple(rows + absent)


def _note(name: str, priors: Mapping[str, Prior], reasons: Mapping[str, str]) -> str:
    if name in reasons:
        return f"not reduced: {reasons[name]}"
    return priors[name].note if name in priors else ""


def _masks(pruned: tuple[Factor, ...], scores: Scores) -> dict[str, Tensor]:
    """By site, what is kept of every site that is or was reduced."""
    return {
        name: kept
        for factor in pruned
        for name, kept in factor.kept().items()
        if name in scores.delta_f or not kept.all()
    }
