"""Occam's window: the reduced models that are not much less probable than the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.averaging.model_space import EnumeratedSpace, LogOdds, OpenElements, SampledSpace
from pyro_bmr.averaging.subset_sampling import Visit
from pyro_bmr.factors.joint import JointFactor


def window_of_all(space: EnumeratedSpace, log_odds: LogOdds, ratio: float, most: int) -> Window:
    r"""Find the models :math:`S` with :math:`\max P / P(S)` up to ``ratio``, the best first.

    Source: Madigan & Raftery (1994), JASA 89, eq. 3; models that contain a better one stay.
    """  # noqa: DOC201
    log_weight = space.log_weight(log_odds)
    best, index = log_weight.topk(min(most, len(log_weight)))
    index = index[best >= best[0] - math.log(ratio)]
    mass = float(log_weight[index].logsumexp(0).exp())
    return _window(space.elements, space.kept[index], space.delta_f[index], log_weight[index], mass)


class WindowTally:
    """Finds the same among the subsets that a walk visits; the mass is the share of its time."""

    def __init__(self, space: SampledSpace, log_odds: LogOdds, ratio: float, most: int) -> None:
        self._elements, self._odds = space.elements, space.elements.log_odds(log_odds)
        self._log_ratio, self._most = math.log(ratio), most
        self._total = 0.0
        # By subset, as bytes: log weight, ΔF, time there.
        self._found: dict[bytes, tuple[float, float, float]] = {}

    def add(self, visit: Visit) -> None:
        """Look at where the chains are."""
        log_weight = visit.kept.to(self._odds) @ self._odds - visit.delta_f
        self._total += float(visit.weight.sum())
        for kept, *numbers in zip(
            visit.kept.cpu(),
            log_weight.tolist(),
            visit.delta_f.tolist(),
            visit.weight.tolist(),
            strict=True,
        ):
            key = kept.numpy().tobytes()
            before = self._found[key][2] if key in self._found else 0.0
            self._found[key] = (numbers[0], numbers[1], before + numbers[2])
        if len(self._found) > 2 * self._most:
            self._found = self._best()

    def window(self) -> Window:
        """Return the best of what was found."""
        found = self._best()
        kept = torch.stack([torch.frombuffer(bytearray(k), dtype=torch.bool) for k in found])
        numbers = torch.tensor(list(found.values()), dtype=torch.float64, device="cpu")
        log_weight, delta_f, time = numbers.T
        mass = float(time.sum()) / self._total
        device = self._odds.device
        where = (kept.to(device), delta_f.to(device), log_weight.to(device))
        return _window(self._elements, *where, mass)

    def _best(self) -> dict[bytes, tuple[float, float, float]]:
        ranked = sorted(self._found.items(), key=lambda item: -item[1][0])[: self._most]
        least = ranked[0][1][0] - self._log_ratio
        return {key: numbers for key, numbers in ranked if numbers[0] >= least}


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


def _window(
    elements: OpenElements, kept: Tensor, delta_f: Tensor, log_weight: Tensor, mass: float
) -> Window:
    weight = log_weight.softmax(0)
    return Window(elements.factor, elements.complete(kept, True), delta_f, weight, mass)
