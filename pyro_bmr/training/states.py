"""States of `prune`: a reduction after training, what led there, and what it measures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from pyro import poutine
from torch import Tensor

from pyro_bmr.estimators.measurement import mean_and_error
from pyro_bmr.graphs.few_rows import take_few_rows
from pyro_bmr.guides.common_noise import NoiseCoupling, couple
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.programs.dry_run import find_tensors
from pyro_bmr.programs.given_values import PriorMessenger
from pyro_bmr.programs.overwriting import overwrite
from pyro_bmr.programs.ranks import ONE, Ranks
from pyro_bmr.programs.streams import Stream
from pyro_bmr.results import Reduction
from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary
from pyro_bmr.training.free_energies import FreeEnergies


@dataclass(frozen=True, eq=False)
class State:
    """A reduction after training.

    ``parent`` is the guide that was reduced; ``draws`` are free energies in nats, at the same
    random numbers in every state; ``values`` are parameters and buffers, by name, of the model and
    of what the guide runs and shares with the guide that came in.
    """

    reduction: Reduction
    parent: Any
    rounds: tuple[Round, ...]
    draws: Tensor
    values: Mapping[str, Tensor]

    def is_below(self, before: State) -> bool:
        """Tell whether F is not above that of another state, within two standard errors."""
        mean, error = self.compare(before)
        return mean <= 2 * error

    def is_lower(self, than: State) -> bool:
        """Tell whether F is below that of another state by more than two standard errors."""
        mean, error = self.compare(than)
        return mean < -2 * error

    def compare(self, other: State) -> tuple[float, float]:
        """Return F here minus F of another state in nats, and its standard error."""
        return mean_and_error(subtract(self.draws, other.draws))

    def refuse(self, after: State) -> State:
        """Stay here, but remember the round that led elsewhere."""
        return replace(self, rounds=(*self.rounds, replace(after.rounds[-1], counts=False)))


@dataclass(frozen=True, eq=False)
class Program:
    """The user's model with its arguments, and how many draws it is measured with.

    Of a ``stream`` the arguments are an example; each of many ``ranks`` has rows of its own.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_samples: int
    stream: Stream | None = None
    ranks: Ranks = ONE

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators of its own that a loader shuffles with, or that noise of ranks is of."""
        own = [] if self.stream is None else self.stream.generators
        return [*own, *self.ranks.generators]

    def start(self, reduction: Reduction, guide: Any) -> State:
        """Measure what the first training made of a guide."""
        return self._state(reduction, guide, (), (0.0, 0.0, 0.0))

    def measure_change(self, last: State, reduction: Reduction) -> tuple[float, float]:
        """Return the realised ΔF of a reduction in nats, before training, and its error."""
        masks = reduction.model.masks.by_site()
        pair = reduction.model, reduction.guide
        after = self._free_energies.measure(pair, _couple(last.reduction, masks))
        return mean_and_error(subtract(after, last.draws))

    def go_on(self, last: State, reduction: Reduction, realised: tuple[float, float]) -> State:
        """Measure what training made of a reduction of the last state."""
        changes = reduction.delta_f, *realised
        together = _add_up(last.reduction, reduction)
        return self._state(together, last.reduction.guide, last.rounds, changes)

    def settle(self, last: State, after: State) -> tuple[State, State]:
        """Measure both on more rows until it is clear, by two standard errors, which is lower."""
        while abs((change := after.compare(last))[0]) <= 2 * change[1]:
            count = 2 * len(after.draws)
            last, shorter = self._measure_more(last, count), after
            after = self._measure_more(after, count)
            if len(after.draws) == len(shorter.draws):
                break
        *before, this = after.rounds
        mean, error = mean_and_error(after.draws)
        this = replace(this, free_energy=mean, free_energy_error=error)
        return last, replace(after, rounds=(*before, this))

    def finish(self, last: State) -> Reduction:
        """Return the reduction of a state, with the model as it was then, and all rounds."""
        self.go_back(last)
        index = max(one.index for one in last.rounds if one.counts)
        marked = tuple(replace(one, kept=one.index == index) for one in last.rounds)
        return replace(last.reduction, rounds=marked)

    def call(self, guide: Callable[..., Any]) -> None:
        """Give a guide its parameters."""
        with poutine.block(), torch.no_grad():
            guide(*self.args, **self.kwargs)

    @torch.no_grad()
    def go_back(self, last: State) -> None:
        """Put the parameters and buffers that all rounds share back to those of a state."""
        for name, tensor in self.find_shared(last.reduction.guide).items():
            overwrite(tensor, last.values[name])

    def find_shared(self, guide: PrunedGuide) -> dict[str, Tensor]:
        """Return the parameters and buffers, by name, that all rounds share."""
        few = take_few_rows(self.args, self.kwargs)
        try:
            of_model = self._find_tensors(*(few or (self.args, self.kwargs)))
        except Exception:
            # Such as a plate of as many rows as there are in all.
            of_model = self._find_tensors(self.args, self.kwargs)
        program = guide.program
        run = {} if program is None else program.find_shared(self.args, self.kwargs)
        return of_model | {f"guide: {name}": tensor for name, tensor in run.items()}

    def _find_tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        drawn = PriorMessenger(*args, **kwargs)(self.model)
        return find_tensors(partial(drawn, *args, **kwargs), [self.model])

    def _state(
        self,
        reduction: Reduction,
        parent: Any,
        rounds: tuple[Round, ...],
        changes: tuple[float, float, float],
    ) -> State:
        pair = reduction.model, reduction.guide
        draws = self._free_energies.measure(pair, _couple(reduction))
        this = Round(len(rounds), reduction.sparsity, *changes, *mean_and_error(draws))
        shared = self.find_shared(reduction.guide)
        values = {name: tensor.detach().clone() for name, tensor in shared.items()}
        return State(reduction, parent, (*rounds, this), draws, values)

    def _measure_more(self, state: State, count: int) -> State:
        """Go back to a state, and measure it on more rows if there can be more."""
        self.go_back(state)
        pair = state.reduction.model, state.reduction.guide
        couplings = _couple(state.reduction)
        draws = self._free_energies.extend(pair, couplings, state.draws, count)
        return replace(state, draws=draws)

    @cached_property
    def _free_energies(self) -> FreeEnergies:
        return FreeEnergies(self.args, self.kwargs, self.num_samples, self.stream, self.ranks)


def subtract(after: Tensor, before: Tensor) -> Tensor:
    """Subtract estimates at the same rows and random numbers, as many as both have."""
    count = min(len(after), len(before))
    return after[:count] - before[:count]


def _couple(
    reduction: Reduction, masks: Mapping[str, Tensor] | None = None
) -> dict[str, NoiseCoupling]:
    return couple((part.factor() for part in reduction.guide.parts), masks)


def _add_up(before: Reduction, after: Reduction) -> Reduction:
    """Add to the ΔF of a reduction those of the rounds before it."""
    return replace(
        after,
        sites=tuple(
            replace(row, realised=_add_realised(earlier.realised, row.realised))
            for earlier, row in zip(before.sites, _add_rows(before.sites, after.sites), strict=True)
        ),
        realised=_add_realised(before.realised, after.realised),
        realised_error=_add_errors(before.realised_error, after.realised_error),
        layers=_add_rows(before.layers, after.layers),
        # What dropping one by one would have led to is known of one reduction only.
        naive_delta_f=None if before.delta_f else after.naive_delta_f,
    )


def _add_realised(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before + after


def _add_errors(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else math.hypot(before, after)


_Row = TypeVar("_Row", SiteSummary, LayerSummary)


def _add_rows(before: tuple[_Row, ...], after: tuple[_Row, ...]) -> tuple[_Row, ...]:
    earlier = {key: row.delta_f for key, row in _number(before)}
    return tuple(
        replace(row, delta_f=row.delta_f + earlier.get(key, 0.0)) for key, row in _number(after)
    )


def _number(rows: tuple[_Row, ...]) -> Iterator[tuple[tuple[str, int], _Row]]:
    """Tell rows of one name, as layers of several groupings may have, apart by their order."""
    seen: Counter[str] = Counter()
    for row in rows:
        yield (row.name, seen[row.name]), row
        seen[row.name] += 1
