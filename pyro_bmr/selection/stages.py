"""From groupings and a selection to masks, one stage after the other, coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind
from pyro_bmr.display import a_or_an, warn
from pyro_bmr.selection.group_members import form_groups
from pyro_bmr.selection.group_scores import GroupScores
from pyro_bmr.selection.groups import Grouping
from pyro_bmr.selection.scores import ElementScores, Scores, TrimmedMasks
from pyro_bmr.selection.selections import Selection
from pyro_bmr.units.producers_and_readers import Structure


def run_stages(
    scores: ElementScores,
    groupings: tuple[Grouping, ...],
    select: Selection,
    find_structure: Callable[[], Structure],
) -> tuple[dict[str, Tensor], tuple[Stage, ...]]:
    """Select in one grouping after the other, each among what those before have left.

    The masks, of elements, are True for those that every stage keeps. ``find_structure`` is called
    only if a grouping needs the units of the model.
    """
    shapes = {name: one.shape for name, one in scores.delta_f.items()}
    masks: dict[str, Tensor] = {}
    stages: list[Stage] = []
    for grouping in groupings:
        if stages:
            scores = scores.given(masks)
        groups = form_groups(grouping, shapes, find_structure) if shapes else None
        if groups is not None and not groups.layers:
            warn(f"groups={grouping!r} has no groups in this model")
        stage_scores: Scores = scores if groups is None else GroupScores(scores, groups)
        chosen = stage_scores.constrained(checked_masks(select, stage_scores))
        stages.append(Stage(stage_scores, chosen))
        by_site = stage_scores.element_masks(chosen)
        masks = {name: mask & masks[name] for name, mask in by_site.items()} if masks else by_site
    return masks, tuple(stages)


@dataclass(frozen=True)
class Stage:
    """What one grouping led to; ``masks`` are by site or by layer, True for what stays."""

    scores: Scores
    masks: Mapping[str, Tensor]


def checked_masks(select: Selection, scores: Scores) -> dict[str, Tensor]:
    """Select, check the masks that come back, and add those of names that have none."""
    masks = select(scores)
    if not isinstance(masks, Mapping):
        msg = (
            f"select returned {a_or_an(masks)}. Expected a function from scores to a "
            "mapping of site names to masks; those of this package are called first, as in "
            "select=by_evidence()"
        )
        raise TypeError(msg)
    unknown = sorted(set(masks) - set(scores.delta_f))
    if unknown:
        msg = (
            f"select returned masks for {unknown}. Expected only what can be reduced: "
            f"{sorted(scores.delta_f)}"
        )
        raise ValueError(msg)
    checked = {}
    for name, kept in scores.kept.items():
        mask = masks.get(name, kept)
        expected = "masks of torch.bool tensors, True for what is kept"
        check_kind(f"select(scores)[{name!r}]", mask, Tensor, expected)
        if mask.dtype != torch.bool or mask.shape != kept.shape:
            msg = (
                f"select returned a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for "
                f"{name!r}. Expected a torch.bool tensor of shape {tuple(kept.shape)}, "
                "True for what is kept"
            )
            raise ValueError(msg)
        if scores.unscored[name] and (~mask & scores.delta_f[name].isposinf()).any():
            told = "; ".join(scores.obstacles(name)) or "fixed, or without a reduced posterior"
            msg = (
                f"select drops some of {name!r} that cannot go: {told}. Expected a mask that "
                "keeps those whose delta_f is inf"
            )
            raise ValueError(msg)
        checked[name] = mask.contiguous()
    return TrimmedMasks(checked, masks.unread) if isinstance(masks, TrimmedMasks) else checked
