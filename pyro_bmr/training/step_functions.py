"""A step of training as a function of tensors, which changes parameters in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.programs.ranks import Ranks
from pyro_bmr.training.adam import AdamState, advance
from pyro_bmr.training.compilation import Gradient, compile_step, join_gradient, trace_gradient
from pyro_bmr.training.feeds import Cut
from pyro_bmr.training.steps import Loss
from pyro_bmr.training.vectors import VectorLayout


@dataclass(frozen=True)
class StepFunction:
    """A step on batches of one size.

    ``differentiate`` goes from the vectors of the parameters and what `StepMaker.read` returns to
    those of the gradient and the loss. ``step`` takes the tensors of an `AdamState`, a place for
    the loss, the learning rate, and what is read.
    """

    gradient: Gradient
    differentiate: Callable[..., tuple[Tensor, ...]]
    step: Callable[..., Any]

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers it takes."""
        return self.gradient.noise_size


@dataclass(frozen=True, eq=False)
class StepMaker:
    """Makes steps of a loss, for all of the ranks that take them together."""

    loss: Loss
    parameters: Mapping[str, Tensor]
    layout: VectorLayout
    clip_norm: float | None
    ranks: Ranks

    def trace(self, cut: Cut) -> StepFunction:
        """Trace a step for batches of the size of this one."""
        feed = self.loss.feed
        batch = feed.batch(feed.inputs(cut))
        gradient = trace_gradient(self.loss, list(self.parameters.values()), batch)
        whole = join_gradient(gradient, self.layout)
        before_batch = len(self.layout.vectors) + 1 + len(gradient.constants)

        def differentiate(*inputs: Tensor) -> tuple[Tensor, ...]:
            return whole(*inputs[:before_batch], *feed.batch(inputs[before_batch:]))

        return StepFunction(gradient, differentiate, self._join(differentiate, self._move))

    def compile(self, traced: StepFunction, state: AdamState, cut: Cut) -> StepFunction:
        """Compile a step as one; between ranks in two parts, which wait for no other rank.

        What is in the state is lost.
        """
        values, nothing = state.values, state.steps.new_zeros(())
        inputs = self.read(traced.gradient, values[0].new_zeros(traced.noise_size), cut)
        before = [*state.tensors, nothing.clone(), nothing]
        if not self.ranks.are_many:
            return replace(traced, step=compile_step(traced.step, [*before, *inputs]))
        gradient = [*map(torch.zeros_like, values), nothing]
        differentiate = compile_step(traced.differentiate, [*values, *inputs])
        move = compile_step(self._move, [*before, *gradient])
        return StepFunction(traced.gradient, differentiate, self._join(differentiate, move))

    def read(self, gradient: Gradient, noise: Tensor, cut: Cut) -> list[Tensor]:
        """Return what a step takes beside the state, a place for the loss, and the rate."""
        noise = noise[: gradient.noise_size]
        return [noise, *gradient.constants, *self.loss.feed.inputs(cut)]

    def detached(self) -> dict[str, Tensor]:
        """Return the parameters as tensors that may be written to."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @property
    def _move(self) -> Callable[..., tuple[()]]:
        # Without what this one holds, which compiled functions would keep.
        return partial(_move, self.clip_norm, 3 * len(self.layout.vectors) + 2)

    def _join(
        self, differentiate: Callable[..., tuple[Tensor, ...]], move: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Make a step of its parts, between which ranks average the gradient."""
        count, average = len(self.layout.vectors), self.ranks.average

        def step(*inputs: Tensor) -> Any:
            before, rest = inputs[: 3 * count + 4], inputs[3 * count + 4 :]
            return move(*before, *average(differentiate(*inputs[:count], *rest)))

        return step


def _move(clip_norm: float | None, size: int, *inputs: Tensor) -> tuple[()]:
    """Change a state, of so many tensors, by a gradient, and put the loss into its place."""
    place, rate, *gradient, loss = inputs[size:]
    place.copy_(loss)
    advance(AdamState.of(inputs[:size]), gradient, loss, rate, clip_norm)
    return ()
