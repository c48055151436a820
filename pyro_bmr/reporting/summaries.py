"""What a reduction did to each site, and what to doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.reporting.flags import count_pruned, count_wide
from pyro_bmr.selection.scores import Scores
from pyro_bmr.shrunk.switched_factors import SwitchedFactor


def summarize(
    scores: Scores,
    chosen: Mapping[str, Tensor],
    remaining: tuple[Factor, ...],
    reasons: Mapping[str, str],
) -> tuple[SiteSummary, ...]:
    """Tell site by site what a reduction did.

    Parameters
    ----------
    scores : Scores
        Before it.
    chosen : mapping
        By reducible site, True for what the selection kept.
    remaining : tuple of Factor
        After it, in the same order.
    reasons : mapping
        By site that stayed whole, why.

    Returns
    -------
    tuple of SiteSummary
        A row a site.

    Examples
    --------
    >>> summarize(Scores((), {}), {}, (), {"z": "it is discrete"})[0].note
    'not reduced: it is discrete'
    """
    rows = []
    for before, after in zip(scores.factors, remaining, strict=True):
        delta_f = before.delta_f(scores.delta_f, chosen)
        kept, kept_before, wide = after.kept(), before.kept(), count_wide(before)
        shrunk = before.reduced if isinstance(before, SwitchedFactor) else {}
        rows += [
            SiteSummary(
                site.name,
                tuple(site.shape),
                int(kept[site.name].count_nonzero()),
                delta_f.get(site.name, 0.0),
                _note(site.name, before, scores, wide.get(site.name, 0), reasons),
                scores.unscored.get(site.name, 0),
                wide.get(site.name, 0),
                count_pruned(kept_before[site.name]),
                int((kept[site.name] & ~chosen[site.name]).sum()) if site.name in shrunk else 0,
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


def name_doubts(name: str, factor: Factor, scores: Scores) -> list[str]:
    """Say what is known of the prior of a site, and which of its elements cannot go.

    Parameters
    ----------
    name : str
        A reducible site.
    factor : Factor
        That holds it, with its prior.
    scores : Scores
        Of all sites.

    Returns
    -------
    list of str
        May be empty.

    Examples
    --------
    >>> from pyro_bmr.factors.factor import Prior
    >>> from pyro_bmr.programs.sites import Site
    >>> from pyro_bmr.factors.independent import IndependentFactor
    >>> prior = Prior(torch.tensor(-0.9), note="1 without a prior, kept")
    >>> site = Site("w", torch.Size([2]))
    >>> factor = IndependentFactor(site, torch.zeros(2), torch.ones(2), prior=prior)
    >>> name_doubts("w", factor, Scores((factor,), {}))
    ['1 without a prior, kept']
    """
    doubts = [factor.priors[name].note]
    if isinstance(factor, SwitchedFactor):
        refused = factor.refused(scores.delta_f).get(name, 0)
        doubts += [f"{refused:,} {factor.refusal}, kept"] if refused else []
    return [doubt for doubt in doubts if doubt]


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
        Why it was left whole, or what to doubt.
    unscored : int
        How many elements cannot go because they have no prior density at zero.
    wide : int
        How many elements have a posterior more than 5 % wider than their Gaussian prior.
    pruned_before : int
        How many elements had been pruned before.
    shrunk : int
        How many elements took a reduced prior other than the spike.

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
    unscored: int = 0
    wide: int = 0
    pruned_before: int = 0
    shrunk: int = 0

    @property
    def total(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()


def _note(name: str, factor: Factor, scores: Scores, wide: int, reasons: Mapping[str, str]) -> str:
    if name in reasons:
        return f"not reduced: {reasons[name]}"
    wider = [f"{wide:,} wider than the prior"] if wide else []
    return "; ".join(name_doubts(name, factor, scores) + wider)
