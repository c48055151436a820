"""Compiled steps of training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.display import warn
from pyro_bmr.programs.ranks import Ranks
from pyro_bmr.training.adam import AdamState
from pyro_bmr.training.blocks import Block, can_capture
from pyro_bmr.training.compilation import NotStaticError
from pyro_bmr.training.feeds import Cut
from pyro_bmr.training.normal_source import NormalSource
from pyro_bmr.training.saved_parameters import moments, pack_parameter, unpack_parameters
from pyro_bmr.training.step_checks import check_compiled, check_traced
from pyro_bmr.training.step_functions import StepFunction, StepMaker
from pyro_bmr.training.steps import HUGE, Loss, Steps, blown_up
from pyro_bmr.training.vectors import VectorLayout

# Steps that are looked at together, and numbers that a block of them holds.
_STEPS, _NUMBERS = 64, 1 << 23

Shapes = tuple[torch.Size, ...]


class CompiledSteps(Steps):
    """Compiled steps, which change vectors of parameters in place.

    The guide has the parameters of when the vectors were looked at last. A batch of another size
    than the first, the last one of an epoch, goes through a traced graph of its own as it is:
    compiling that too would take longer than it saves.
    """

    def __init__(
        self, loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None, ranks: Ranks
    ) -> None:
        self._loss = loss
        self._ranks = ranks
        with ranks.together():
            if len({(p.dtype, p.device) for p in parameters.values()}) > 1:
                msg = "its parameters have several dtypes or devices"
                raise NotStaticError(msg)
            self._layout = VectorLayout.of(parameters)
            self._maker = StepMaker(loss, parameters, self._layout, clip_norm, ranks)
            self._own = self._maker.detached()
            self._state = AdamState.like(self._layout.join(self._own))
            self._views = self._layout.split(self._state.values)
            self._places, self._moved = list(self._own.values()), list(self._views.values())
            first, self._other, last = loss.feed.examples()
            self._first = self._maker.trace(first)
        check_traced(self._maker, self._first, self._state, self._other)
        with ranks.together():
            compiled = self._maker.compile(self._first, self._state, first)
        check_compiled(self._maker, compiled, self._state, self._other)
        self._state.begin(self._layout.join(self._own))
        with ranks.together():
            is_odd = _shapes(last) != _shapes(first)
            odd = self._maker.trace(last) if is_odd else compiled
        columns = max(compiled.noise_size, odd.noise_size)
        held = sum(tensor.numel() for tensor in first)
        most = min(_STEPS, max(1, _NUMBERS // max(1, held, columns)))
        count = min(ranks.gather(_divide(loss.feed.steps - is_odd, most)))
        self._noise = NormalSource(count, columns, self._state.values[0])
        self._blocks = {_shapes(last): self._make_block(odd, last, 1)}
        self._blocks[_shapes(first)] = self._make_block(compiled, first, count)

    @override
    def run(self, cuts: Iterable[Cut], rates: Sequence[float]) -> Tensor:
        losses, ahead = [], iter(cuts)
        # In one transfer, which a GPU would have to wait for.
        left = self._state.values[0].new_tensor(rates)
        while some := list(islice(ahead, _STEPS)):
            try:
                losses.append(self._take_steps(some, left))
            except BaseException:
                # An interrupt may come in the middle of a step.
                torch._foreach_copy_(self._moved, self._places)
                raise
            left = left[len(some) :]
            self.steps_done += len(some)
        return torch.cat(losses)

    @override
    def renew_noise(self) -> None:
        self._noise.renew()

    @override
    def verify(self) -> None:
        try:
            check_traced(self._maker, self._first, self._state, self._other)
        except NotStaticError as reason:
            warn(
                f"the program changed while it was trained, which fit did not follow: {reason} "
                "Train with compile=False"
            )

    @override
    def pack(self) -> dict[str, Any]:
        means, squares = map(self._layout.split, (self._state.means, self._state.squares))
        steps = float(self._state.steps)
        rows = [
            pack_parameter(name, value, means[name], squares[name], steps)
            for name, value in self._views.items()
        ]
        noise = self._noise.states()
        return {"parameters": rows, "steps_done": self.steps_done, "noise": noise}

    @override
    @torch.no_grad()
    def go_on_from(self, packed: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        own = unpack_parameters(packed["parameters"], parameters)
        if len(own) != len(self._own):
            msg = (
                "the checkpoint has parameters that came into being after the first step, which a "
                "compiled program has not. Expected the same program and options; train with "
                "compile=False"
            )
            raise ValueError(msg)
        state = self._state
        state.begin(self._layout.join(self._own))
        moved = list(moments(packed["parameters"], own))
        if len(moved) == len(own):
            _, *both, steps = zip(*moved, strict=True)
            for vectors, saved in zip((state.means, state.squares), both, strict=True):
                torch._foreach_copy_(list(self._layout.split(vectors).values()), list(saved))
            state.steps.fill_(max(steps))
        self.steps_done = packed["steps_done"]
        self._noise.set_states(packed["noise"])

    @torch.no_grad()
    def _take_steps(self, cuts: Sequence[Cut], rates: Tensor) -> Tensor:
        """Take steps and look at what came of them: either the guide gets it, or all stops."""
        found: list[Tensor] = []
        for shapes, some in groupby(cuts, _shapes):
            block = self._find_block(shapes, cuts)
            while few := list(islice(some, block.count)):
                self._noise.draw(len(few))
                found.append(block.run(few, rates[: len(few)]))
                rates = rates[len(few) :]
        losses = torch.cat(found)
        extremes = torch._foreach_norm(self._state.values, torch.inf)
        if not (self._state.finite & (torch.stack(extremes) < HUGE).all()):
            raise self._give_up(cuts, losses.isfinite().tolist())
        torch._foreach_copy_(self._places, self._moved)
        return losses

    def _give_up(self, cuts: Sequence[Cut], finite: Sequence[bool]) -> FloatingPointError:
        bad = len(cuts) - 1 if all(finite) else finite.index(False)
        culprits = blown_up(self._views)
        if not culprits:
            function = self._maker.trace(cuts[bad])
            self._noise.draw(1)
            inputs = self._maker.read(function.gradient, self._noise.numbers[0], cuts[bad])
            told = self._ranks.average(function.differentiate(*self._state.values, *inputs))
            culprits = blown_up(self._layout.split(told[:-1]))
        return self._fail(bad, culprits, f" that was looked at, after step {self.steps_done}")

    def _find_block(self, shapes: Shapes, cuts: Sequence[Cut]) -> Block:
        if shapes not in self._blocks:
            cut = next(one for one in cuts if _shapes(one) == shapes)
            self._blocks[shapes] = self._make_block(self._maker.trace(cut), cut, 1)
        return self._blocks[shapes]

    @torch.no_grad()
    def _make_block(self, function: StepFunction, cut: Cut, count: int) -> Block:
        def arrange(place: Tensor, rate: Tensor, noise: Tensor, cut: Cut) -> list[Tensor]:
            read = self._maker.read(function.gradient, noise, cut)
            return [*self._state.tensors, place, rate, *read]

        block = Block(function.step, arrange, count, cut, self._noise.numbers)
        if can_capture(self._state.steps.device) and not self._ranks.are_many:
            # So nothing moves.
            self._state.finite.fill_(False)
            block.capture()
            self._state.finite.fill_(True)
        return block


def _shapes(cut: Cut) -> Shapes:
    """Return what a step is traced for."""
    return tuple(tensor.shape for tensor in cut)


def _divide(steps: int, most: int) -> int:
    """Divide steps into blocks of one size, at most so large, with few left over."""
    return steps // math.ceil(steps / most)
