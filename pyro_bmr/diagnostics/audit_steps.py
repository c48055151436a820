"""From a full model and guide to the reduced ones, as these are, site by site."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmr.guides.common_noise import NoiseCoupling
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.selection.decision import Decision


def take_steps(decision: Decision, model: Any, guide: Any) -> AuditSteps:
    """Look at a reduced model and guide, whatever became of them, and at how they came about.

    Where the guide draws what the model holds at zero, F is infinite: a ``ValueError``.
    """
    expected_model, expected_guide, _ = decision.assemble()
    right = {n: k for factor in decision.remaining() for n, k in factor.kept().items()}
    factors = read_guide(guide, decision.origin)
    in_guide = {n: k for factor in factors for n, k in factor.kept().items()}
    in_model = model.masks.by_site() if isinstance(model, PrunedModel) else {}
    misfits = {
        name: int(((found[0] != kept) | (found[1] != kept)).sum())
        for name, kept in right.items()
        if (found := [_like(masks.get(name), kept) for masks in (in_guide, in_model)])
    }
    misfits = {name: count for name, count in misfits.items() if count}
    in_model = {name: _like(in_model.get(name), right[name]) for name in misfits}
    in_guide = {name: _like(in_guide.get(name), right[name]) for name in misfits}
    _check_finite(in_model, in_guide)
    decision = replace(decision, masks={**decision.masks, **in_guide})
    changed = {*decision.changed(), *misfits}
    names = [name for name in decision.order if name in changed]
    return AuditSteps(
        decision,
        (model, guide),
        tuple(tuple(names[:i]) for i in range(len(names) + 1)),
        misfits,
        in_model,
        not misfits and not (_agree(guide, expected_guide) and decision.is_shared_unchanged()),
    )


@dataclass(frozen=True, eq=False)
class AuditSteps:
    """Pairs of a model and a guide from the full ones to the reduced ones, which are ``last``.

    ``decision`` has the masks that are found in the guide; ``sites`` are those reduced in each
    step, from none to all. For sites whose masks are not as decided, ``misfits`` counts the
    elements, and ``model_masks`` has the masks of the model. ``trained``: since the reduction.
    """

    decision: Decision
    last: tuple[Any, Any]
    sites: tuple[tuple[str, ...], ...]
    misfits: Mapping[str, int]
    model_masks: Mapping[str, Tensor]
    trained: bool

    def pair(self, sites: tuple[str, ...]) -> tuple[Any, Any]:
        """Make the model and the guide of a step; of the last, as it is unless trained since."""
        if sites and sites == self.sites[-1] and not self.trained:
            return self.last
        model, guide, _ = self.decision.restrict(sites).assemble()
        found = {n: mask for n, mask in self.model_masks.items() if n in sites}
        if found:
            model = PrunedModel(
                model.model, model.masks.by_site() | found, model.centers, model.marginal
            )
        device = _device(self.last[1])
        return model.to(device), guide.to(device)

    def couplings(self, sites: Collection[str]) -> dict[str, NoiseCoupling]:
        """Tell how to draw from the guide of a step with the noise of the full one."""
        return self.decision.restrict(sites).couplings()

    def notes(self) -> tuple[str, ...]:
        """Tell what is not as it was decided, in one note per site."""
        return tuple(
            f"{name}: the masks of the model or the guide are not those of the reduction in "
            f"{count:,} of {self.model_masks[name].numel():,} elements"
            for name, count in self.misfits.items()
        )


def _check_finite(in_model: Mapping[str, Tensor], in_guide: Mapping[str, Tensor]) -> None:
    for name, kept in in_model.items():
        free = int((in_guide[name] & ~kept).sum())
        if free:
            msg = (
                f"{name}: the guide draws {free:,} elements that the model holds at zero, so that "
                "F is infinite. Expected the masks of the reduction in both: take result.model and "
                "result.guide together"
            )
            raise ValueError(msg)


def _like(mask: Tensor | None, kept: Tensor) -> Tensor:
    """Return a mask, which is True everywhere if there is none, where another one is."""
    if mask is None:
        return torch.ones_like(kept)
    return mask.to(kept.device).expand(kept.shape)


def _agree(guide: Any, expected: nn.Module) -> bool:
    now = guide.state_dict() if isinstance(guide, nn.Module) else {}
    then = expected.state_dict()
    return now.keys() == then.keys() and all(
        torch.equal(now[name].to(value.device), value) for name, value in then.items()
    )


def _device(guide: Any) -> torch.device | None:
    parameters = guide.parameters() if isinstance(guide, nn.Module) else ()
    return next((parameter.device for parameter in parameters), None)
