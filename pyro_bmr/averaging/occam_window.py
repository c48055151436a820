"""Occam's window: the reduced models that are not much less probable than the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.averaging.model_space import EnumeratedSpace, ModelSpace, OpenElements, SampledSpace
from pyro_bmr.factors.joint import JointFactor


def find_window(
    space: ModelSpace, log_odds: Mapping[str, float], ratio: float, most: int
) -> Window:
    r"""Find the models :math:`S` with :math:`\max P / P(S)` up to ``ratio``, the best first.

    Source: Madigan & Raftery (1994), JASA 89, eq. 3; models that contain a better one stay.
    """  # noqa: DOC201
    return _FIND[type(space)](space, log_odds, math.log(ratio), most)


@dataclass(frozen=True)
class Window:
    r"""The most probable reduced models of a correlated factor.

    Parameters
    ----------
    factor : JointFactor
        The posterior that they reduce.
    kept : Tensor
        Boolean, of shape ``(models, n)``, over the elements that were left: True where present.
    delta_f : Tensor
        Joint :math:`\Delta F` in nats, of shape ``(models,)``.
    weight : Tensor
        Posterior probability of each, of shape ``(models,)``; they add up to 1.
    mass : float
        Posterior probability of the window among all reduced models.

    Examples
    --------
    Two models, of which the better has lost its second element, and how probable each element is:

    >>> kept = torch.tensor([[True, False], [True, True]])
    >>> window = Window(None, kept, torch.tensor([-2.0, 0.0]), torch.tensor([0.88, 0.12]), 1.0)
    >>> window.weight @ window.kept.float()
    tensor([1.0000, 0.1200])
    """

    factor: JointFactor
    kept: Tensor
    delta_f: Tensor
    weight: Tensor
    mass: float

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def masks(self) -> dict[str, Tensor]:
        """By site, of shape ``(models, *site)``, True where an element is present."""
        return self.factor.spread(self.kept, False)


def _enumerated(
    space: EnumeratedSpace, log_odds: Mapping[str, float], log_ratio: float, most: int
) -> Window:
    log_weight = space.log_weight(log_odds)
    best, index = log_weight.topk(min(most, len(log_weight)))
    index = index[best >= best[0] - log_ratio]
    mass = float(log_weight[index].logsumexp(0).exp())
    return _window(space.elements, space.kept[index], space.delta_f[index], log_weight[index], mass)


def _sampled(
    space: SampledSpace, log_odds: Mapping[str, float], log_ratio: float, most: int
) -> Window:
    """Look among the subsets that the walk visits."""
    odds = space.elements.log_odds(log_odds)
    total = 0.0
    # By subset, as bytes: log weight, ΔF, time there.
    found: dict[bytes, tuple[float, float, float]] = {}
    for visit in space.visits(log_odds, space.num_samples):
        log_weight = visit.kept.to(odds) @ odds - visit.delta_f
        total += float(visit.weight.sum())
        for kept, *numbers in zip(
            visit.kept.cpu(),
            log_weight.tolist(),
            visit.delta_f.tolist(),
            visit.weight.tolist(),
            strict=True,
        ):
            key = kept.numpy().tobytes()
            before = found[key][2] if key in found else 0.0
            found[key] = (numbers[0], numbers[1], before + numbers[2])
        if len(found) > 2 * most:
            found = _best(found, log_ratio, most)
    found = _best(found, log_ratio, most)
    kept = torch.stack([torch.frombuffer(bytearray(k), dtype=torch.bool) for k in found])
    log_weight, delta_f, time = torch.tensor(
        list(found.values()), dtype=torch.float64, device="cpu"
    ).T
    mass = float(time.sum()) / total
    device = odds.device
    return _window(space.elements, kept.to(device), delta_f.to(device), log_weight.to(device), mass)


def _best(
    found: dict[bytes, tuple[float, float, float]], log_ratio: float, most: int
) -> dict[bytes, tuple[float, float, float]]:
    ranked = sorted(found.items(), key=lambda item: -item[1][0])[:most]
    least = ranked[0][1][0] - log_ratio
    return {key: numbers for key, numbers in ranked if numbers[0] >= least}


def _window(
    elements: OpenElements, kept: Tensor, delta_f: Tensor, log_weight: Tensor, mass: float
) -> Window:
    weight = log_weight.softmax(0)
    return Window(elements.factor, elements.complete(kept, True), delta_f, weight, mass)


_FIND: dict[type, Callable[..., Window]] = {
    EnumeratedSpace: _enumerated,
    SampledSpace: _sampled,
}
