"""F of the states of `prune`, measured on as many rows as a comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.estimators.measurement import common_draws
from pyro_bmr.estimators.meter import BLOCK, Meter
from pyro_bmr.guides.common_noise import NoiseCoupling
from pyro_bmr.programs.pairs import Pair
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.streams import Stream
from pyro_bmr.selection.realised import ROWS

# Not those of `by_free_energy` (0) nor of `reduce` (1), which have chosen by theirs.
_SEED = 2
# Estimates of a part of the rows each, at least.
_FEWEST = 16


class FreeEnergies:
    """Measures F of similar programs, always at the same rows and random numbers.

    Of few rows, all are in each of ``num_samples`` estimates. Of many, an estimate is of a part of
    them: at first all rows come once, or little more, and at last ``num_samples`` times. Of a
    ``stream`` the arguments are an example.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_samples: int,
        stream: Stream | None,
    ) -> None:
        self._args, self._kwargs, self._num_samples = args, kwargs, num_samples
        self._stream = stream
        self._meter: Meter | None = None

    def measure(self, pair: Pair, couplings: Mapping[str, NoiseCoupling]) -> Tensor:
        """Return the first estimates of F in nats, float64, on the CPU."""
        parts = self._find_meter(pair).parts
        if parts == 1:
            complexity, accuracy = common_draws(
                *pair, self._args, self._kwargs, self._num_samples, couplings=couplings
            )
            return complexity - accuracy
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        return self.extend(pair, couplings, nothing, max(_FEWEST, parts))

    def extend(
        self, pair: Pair, couplings: Mapping[str, NoiseCoupling], draws: Tensor, count: int
    ) -> Tensor:
        """Return so many estimates, or as many as there are at last; ``draws`` are the first."""
        meter = self._find_meter(pair)
        most = 0 if meter.parts == 1 else self._num_samples * meter.parts
        stop = BLOCK * math.ceil(min(count, most) / BLOCK)
        if stop <= len(draws):
            return draws
        return torch.cat([draws, meter.measure(pair, len(draws), stop, couplings)])

    def _find_meter(self, example: Pair) -> Meter:
        """Make the meter when there is a first program to measure."""
        if self._meter is None:
            with explained_refusals(*example, self._args, self._kwargs):
                self._meter = Meter(example, self._args, self._kwargs, ROWS, _SEED, self._stream)
        return self._meter
