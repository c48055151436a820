"""What a reduction did to each site, and what to doubt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor, is_everything
from pyro_bmr.factors.switched import SwitchedFactor
from pyro_bmr.mathematics.transfers import to_numbers
from pyro_bmr.selection.scores import ElementScores
from pyro_bmr.selection.stages import Stage
from pyro_bmr.units.producers_and_readers import HELD


def summarize(
    scores: ElementScores,
    chosen: Mapping[str, Tensor],
    remaining: tuple[Factor, ...],
    reasons: Mapping[str, str],
    absent: Mapping[str, torch.Size],
    released: Mapping[str, float],
    wide: Mapping[str, int],
    realised: Mapping[str, float] | None = None,
) -> tuple[SiteSummary, ...]:
    """Tell site by site what a reduction did.

    ``chosen``: what the selection kept. ``remaining``: the factors after it, in the same order.
    ``reasons``: of sites that stayed whole. ``absent``: shapes of those of them that the guide does
    not hold. ``released``: what ΔF is less than that of spikes, in nats. ``wide``: how many
    elements are wider than their prior. ``realised``: ΔF as measured, if it was.
    """  # noqa: DOC201
    rows = []
    delta_f = scores.parts(chosen)
    kept, kept_before = _count_kept(remaining), _count_kept(scores.factors)
    for before, after in zip(scores.factors, remaining, strict=True):
        shrunk = before.reduced if isinstance(before, SwitchedFactor) else {}
        taken = after.kept() if shrunk else {}
        shrinks = {name: int((taken[name] & ~chosen[name]).sum()) for name in shrunk}
        reduced = {
            site.name
            for site in before.sites
            if shrinks.get(site.name) or kept[site.name] < kept_before[site.name]
        }
        rows += [
            SiteSummary(
                site.name,
                tuple(site.shape),
                kept[site.name],
                delta_f.get(site.name, 0.0) + released.get(site.name, 0.0),
                _note(site.name, scores, wide.get(site.name, 0), reasons, site.name in reduced),
                scores.unscored.get(site.name, 0),
                wide.get(site.name, 0),
                site.shape.numel() - kept_before[site.name],
                shrinks.get(site.name, 0),
                None if realised is None else realised.get(site.name, 0.0),
            )
            for site in before.sites
        ]
    rows += [
        SiteSummary(name, tuple(shape), 0, 0.0, f"{_WHOLE}{reasons[name]}", held=False)
        for name, shape in absent.items()
    ]
    return tuple(rows)


def fold_alike(sites: tuple[SiteSummary, ...]) -> tuple[SiteSummary, ...]:
    """Make one row of many sites that stayed whole for the same reason, as one long vector."""
    alike: dict[tuple[str, bool], list[SiteSummary]] = {}
    for site in sites:
        alike.setdefault((site.note, site.held), []).append(site)
    folded = []
    for site in sites:
        same = alike[site.note, site.held]
        if len(same) <= _FEW or not site.note.startswith(_WHOLE):
            folded.append(site)
        elif site is same[0]:
            shape = (sum(torch.Size(one.shape).numel() for one in same),)
            name, kept = f"{site.name} and {len(same) - 1} others", sum(one.kept for one in same)
            folded.append(replace(site, name=name, shape=shape, kept=kept))
    return tuple(folded)


def summarize_layers(stages: tuple[Stage, ...]) -> tuple[LayerSummary, ...]:
    """Tell layer by layer what became of groups; nothing where elements stand for themselves."""
    rows = []
    for stage in stages:
        parts = stage.scores.layer_delta_f(stage.masks)
        kept = stage.scores.kept if parts else {}
        rows += [
            LayerSummary(
                layer.name,
                layer.kind,
                layer.count,
                int((stage.masks[layer.name] & kept[layer.name]).sum()),
                parts[layer.name],
            )
            for layer in stage.scores.layers
        ]
    return tuple(rows)


def note_held(stages: tuple[Stage, ...]) -> tuple[str, ...]:
    """Say in which layers units went that cannot be cut out."""
    names = [
        layer.name
        for stage in stages
        for layer in stage.scores.layers
        if layer.held and not stage.masks[layer.name].all()
    ]
    if not names:
        return ()
    told = (
        f"compact() will not cut units out of {', '.join(names)}: {HELD}; RNNCell, LSTMCell and "
        "GRUCell do not"
    )
    return (told,)


def sum_released(stages: tuple[Stage, ...]) -> dict[str, float]:
    """Add up by site, in nats, what stages gain as nothing depends on some elements any more."""
    total: Counter[str] = Counter()
    for stage in stages:
        total.update(stage.scores.released_delta_f(stage.masks))
    return dict(total)


@dataclass(frozen=True)
class LayerSummary:
    """What a reduction did to one layer of groups.

    Parameters
    ----------
    name : str
        The layer.
    kind : str
        ``"unit"``, ``"channel"``, ``"head"`` or ``"input"``; ``"group"`` for the labels of a user,
        ``"element"`` where the elements of a site each stand for themselves.
    groups : int
        How many there are.
    kept : int
        How many stay.
    delta_f : float
        Its part in the joint ΔF, in nats; an element that goes with groups of several layers counts
        in the first.

    Examples
    --------
    >>> LayerSummary("fc1.weight", "unit", 300, 41, -250.0).kept
    41
    """

    name: str
    kind: str
    groups: int
    kept: int
    delta_f: float


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
    realised : float, optional
        Its part in ΔF as measured on the data, in nats; None if nothing was measured.
    held : bool
        Whether the guide holds it; not a discrete site, say, whose elements count nowhere.

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
    realised: float | None = None
    held: bool = True

    @property
    def total(self) -> int:
        """How many elements the guide has of it."""
        return torch.Size(self.shape).numel() if self.held else 0


@dataclass(frozen=True)
class Round:
    """One round of `prune`: what was predicted, and what came of it.

    Parameters
    ----------
    index : int
        0 for the first training, in which nothing is pruned.
    sparsity : float
        Fraction of all elements that are pruned by now.
    predicted : float
        ΔF of this round's reduction in nats, in closed form.
    realised, realised_error : float
        Measured change of F by the reduction itself, before training again, with its standard
        error.
    free_energy, free_energy_error : float
        Measured F in nats after training, with its standard error.
    kept : bool
        Whether the result is the state after this round.
    counts : bool
        Whether what followed went on from here; not if F was higher after training than before.

    Examples
    --------
    >>> Round(1, 0.9, -150.0, -120.0, 1.0, 1450.0, 0.5).sparsity
    0.9
    """

    index: int
    sparsity: float
    predicted: float
    realised: float
    realised_error: float
    free_energy: float
    free_energy_error: float
    kept: bool = False
    counts: bool = True


_WHOLE = "not reduced: "

# So many sites that stayed whole for the same reason have rows of their own.
_FEW = 3


def _count_kept(factors: tuple[Factor, ...]) -> dict[str, int]:
    """Count by site what has not been pruned."""
    counts = {site.name: site.shape.numel() for factor in factors for site in factor.sites}
    kept = {name: kept for factor in factors for name, kept in factor.kept().items()}
    masks = {name: mask for name, mask in kept.items() if not is_everything(mask)}
    found = to_numbers([mask.count_nonzero() for mask in masks.values()])
    return counts | dict(zip(masks, found, strict=True))


def _note(
    name: str, scores: ElementScores, wide: int, reasons: Mapping[str, str], reduced: bool
) -> str:
    if name in reasons:
        return f"{_WHOLE}{reasons[name]}"
    (prior,) = (factor.priors[name] for factor in scores.factors if name in factor.priors)
    told = [prior.note_if_reduced] if reduced and prior.note_if_reduced else []
    wider = [f"{wide:,} wider than the prior"] if wide else []
    return "; ".join(scores.obstacles(name) + told + wider)
