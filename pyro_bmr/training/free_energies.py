"""F of the states of `prune`, measured on as many rows as a comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.estimators.measurement import common_draws, streamed_draws
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.estimators.parts_of_rows import BLOCK, FEWEST_PARTS
from pyro_bmr.guides.common_noise import NoiseCoupling
from pyro_bmr.programs.batches import Batches
from pyro_bmr.programs.pairs import Pair
from pyro_bmr.programs.ranks import ONE, Ranks
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
    ``stream`` the arguments are an example. Each of many ``ranks`` has rows of its own.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_samples: int,
        stream: Stream | None,
        ranks: Ranks = ONE,
    ) -> None:
        self._args, self._kwargs, self._num_samples = args, kwargs, num_samples
        self._stream, self._ranks = stream, ranks
        self._meter: Meter | None = None
        batches = Batches(args, kwargs, 1) if stream is None else stream.batches
        lengths = {len(t) if t.dim() else 0 for t in batches.tensors.values()}
        rows = max(lengths, default=0) if stream is None else batches.size
        self._has_meter = ranks.are_many or rows >= FEWEST_PARTS * ROWS

    def measure(self, pair: Pair, couplings: Mapping[str, NoiseCoupling]) -> Tensor:
        """Return the first estimates of F in nats, float64, on the CPU."""
        meter = self._find_meter(pair)
        if meter is None:
            return self._measure_whole(pair, couplings)
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        first = self._num_samples if meter.parts == 1 else max(_FEWEST, meter.parts)
        draws = self.extend(pair, couplings, nothing, first)
        if self._ranks.are_many and not draws.isfinite().all():
            meter.raise_not_finite("after training")
        return draws

    def extend(
        self, pair: Pair, couplings: Mapping[str, NoiseCoupling], draws: Tensor, count: int
    ) -> Tensor:
        """Return so many estimates, or as many as there are at last; ``draws`` are the first."""
        meter = self._find_meter(pair)
        if meter is None:
            return draws
        stop = BLOCK * math.ceil(min(count, self._num_samples * meter.parts) / BLOCK)
        if stop <= len(draws):
            return draws
        return torch.cat([draws, meter.measure(pair, len(draws), stop, couplings)])

    def _measure_whole(self, pair: Pair, couplings: Mapping[str, NoiseCoupling]) -> Tensor:
        if self._stream is not None:
            draws = streamed_draws(*pair, self._stream, self._num_samples, couplings=couplings)
        else:
            data = self._args, self._kwargs
            draws = common_draws(*pair, *data, self._num_samples, couplings=couplings)
        complexity, accuracy = draws
        return complexity - accuracy

    def _find_meter(self, example: Pair) -> Meter | None:
        """Make the meter when there is a first program to measure; None if one has few rows."""
        if self._meter is None and self._has_meter:
            how = ROWS, _SEED, self._stream, self._ranks
            with explained_refusals(*example, self._args, self._kwargs):
                self._meter = Meter(example, self._args, self._kwargs, *how)
            # A likelihood that is no sum over rows is measured whole.
            self._has_meter = self._ranks.are_many or self._meter.parts > 1
        return self._meter if self._has_meter else None
