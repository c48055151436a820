"""Compiled steps of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from pyro_bmr.display import warn
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.training.adam import AdamState, update
from pyro_bmr.training.compilation import (
    FixedNoise,
    Gradient,
    NotStaticError,
    compile_step,
    flatten_gradient,
    make_step,
    trace_gradient,
)
from pyro_bmr.training.normal_source import NormalSource
from pyro_bmr.training.ranks import Ranks
from pyro_bmr.training.saved_parameters import moments, pack_parameter, unpack_parameters
from pyro_bmr.training.steps import Loss, Steps, blown_up

_TOLERANCE = 1e-5
# Of updates. A compiler rounds otherwise, and a ReLU that thereby opens moves gradients by more.
_COMPILED_TOLERANCE = 1e-3
_STEPS, _NUMBERS = 64, 1 << 23


class CompiledSteps(Steps):
    """Compiled steps, with all parameters in one vector.

    A batch of another size than the first, the last one of an epoch, goes through a traced graph of
    its own as it is: compiling that too would take longer than it saves.
    """

    def __init__(
        self, loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None, ranks: Ranks
    ) -> None:
        self._loss = loss
        self._ranks = ranks
        self._parameters = dict(parameters)
        self._clip_norm = clip_norm
        # A function without these steps, which would hold what they hold beyond their end.
        self._move = partial(_move, clip_norm)
        self._functions = {}
        with ranks.together():
            if len({(p.dtype, p.device) for p in parameters.values()}) > 1:
                msg = "its parameters have several dtypes or devices"
                raise NotStaticError(msg)
            values = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
            self._state, self._before = AdamState.start(values), values
            first, self._other, last = loss.feed.examples()
            self._traced = gradient, _ = self._function(first)
        self._check_traced()
        with ranks.together():
            compiled = self._compile(first)
        self._functions[loss.feed.count(first)] = gradient, compiled
        self._check_compiled(gradient, compiled)
        sizes = [self._function(cut)[0].noise_size for cut in (first, last)]
        # The losses of a block of steps are looked at together, and its noise is kept until then.
        held = sum(tensor.numel() for tensor in pytree.tree_leaves(first))
        block = max(1, min(_STEPS, _NUMBERS // max(1, held, *sizes)))
        self._block = min(ranks.gather(block))
        self._noise = NormalSource(self._block, max(sizes), values)

    @override
    def run(self, cuts: Iterable[Any], rates: Sequence[float]) -> Tensor:
        losses, ahead = [], zip(cuts, rates, strict=True)
        while block := list(islice(ahead, self._block)):
            losses.append(self._run_block(*zip(*block, strict=True)))
            self.steps_done += len(block)
        return torch.cat(losses)

    @override
    def renew_noise(self) -> None:
        self._noise.renew()

    @override
    @torch.no_grad()
    def finish(self) -> None:
        for name, value in self._split(self._state.values).items():
            self._parameters[name].copy_(value)

    @override
    def verify(self) -> None:
        try:
            self._check_traced()
        except NotStaticError as reason:
            warn(
                f"the program changed while it was trained, which fit did not follow: {reason} "
                "Train with compile=False"
            )

    @override
    def pack(self) -> dict[str, Any]:
        values, means, squares = (self._split(part) for part in self._state[:3])
        steps = float(self._state.steps)
        rows = [
            pack_parameter(name, values[name], means[name], squares[name], steps)
            for name in self._parameters
        ]
        noise = self._noise.states()
        return {"parameters": rows, "steps_done": self.steps_done, "noise": noise}

    @override
    @torch.no_grad()
    def go_on_from(self, packed: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        own = unpack_parameters(packed["parameters"], parameters)
        values = torch.cat([p.detach().reshape(-1) for p in own.values()])
        if values.shape != self._state.values.shape:
            msg = (
                "the checkpoint has parameters that came into being after the first step, which a "
                "compiled program has not. Expected the same program and options; train with "
                "compile=False"
            )
            raise ValueError(msg)
        state = AdamState.start(values)
        moved = list(moments(packed["parameters"], own))
        if len(moved) == len(own):
            _, means, squares, steps = zip(*moved, strict=True)
            mean, square = (torch.cat([t.reshape(-1) for t in one]) for one in (means, squares))
            state = AdamState(values, mean, square, state.steps + max(steps))
        self._state, self._before = state, values
        self.steps_done = packed["steps_done"]
        self._noise.set_states(packed["noise"])

    @torch.no_grad()
    def _run_block(self, cuts: Sequence[Any], rates: Sequence[float]) -> Tensor:
        start = (self._before, self._state)
        noise = self._noise.draw(len(cuts))
        steps = list(zip(cuts, self._state.values.new_tensor(rates), noise, strict=True))
        losses = [self._advance(*step) for step in steps]
        finite = torch.stack(losses).isfinite()
        if not finite.all():
            self._before, self._state = start
            bad = int(finite.to(torch.uint8).argmin())
            for step in steps[:bad]:
                self._advance(*step)
            last_finite = self._state._replace(values=self._before)
            culprits = blown_up(self._split(self._state.values))
            self._advance(*steps[bad])
            culprits = culprits or blown_up(self._split(self._state.values))
            self._state = last_finite
            raise self._fail(bad, culprits)
        if not self._state.values.isfinite().all():
            culprits = blown_up(self._split(self._state.values))
            self._state = self._state._replace(values=self._before)
            raise self._fail(len(steps) - 1, culprits)
        return torch.stack(losses)

    def _advance(self, cut: Any, rate: Tensor, noise: Tensor) -> Tensor:
        gradient, step = self._function(cut)
        *state, loss = step(*self._inputs(gradient, self._state, rate, noise, cut))
        self._before, self._state = self._state.values, AdamState(*state)
        return loss

    def _function(self, cut: Any) -> tuple[Gradient, Callable[..., Any]]:
        """Return the traced gradient and the step for a batch of this size."""
        feed = self._loss.feed
        size = feed.count(cut)
        if size not in self._functions:
            parameters = list(self._parameters.values())
            gradient = trace_gradient(self._loss, parameters, feed.batch(feed.inputs(cut)))
            differentiate = self._differentiate(gradient)
            step = make_step(differentiate, self._move, self._ranks.average)
            self._functions[size] = gradient, step
        return self._functions[size]

    def _differentiate(self, gradient: Gradient) -> Callable[..., tuple[Tensor, ...]]:
        """Return a function of a cut in the place of its batch."""
        whole = flatten_gradient(gradient, [p.shape for p in self._parameters.values()])
        before_batch, feed = 2 + len(gradient.constants), self._loss.feed

        def differentiate(*inputs: Tensor) -> tuple[Tensor, ...]:
            return whole(*inputs[:before_batch], *feed.batch(inputs[before_batch:]))

        return differentiate

    def _compile(self, cut: Any) -> Callable[..., Any]:
        """Compile the step as one; between ranks in two parts, which wait for no other rank."""
        gradient, step = self._function(cut)
        values = self._state.values
        rate, noise = values.new_zeros(()), values.new_empty(gradient.noise_size)
        inputs = self._inputs(gradient, self._state, rate, noise, cut)
        if not self._ranks.are_many:
            return compile_step(step, inputs)
        differentiate = self._differentiate(gradient)
        return make_step(
            compile_step(differentiate, [values, *inputs[5:]]),
            compile_step(self._move, [*self._state, torch.zeros_like(values), rate]),
            self._ranks.average,
        )

    def _inputs(
        self, gradient: Gradient, state: AdamState, rate: Tensor, noise: Tensor, cut: Any
    ) -> list[Tensor]:
        noise = noise[: gradient.noise_size]
        return [*state, rate, noise, *gradient.constants, *self._loss.feed.inputs(cut)]

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in self._parameters.values()])
        return {
            name: part.view(p.shape)
            for (name, p), part in zip(self._parameters.items(), parts, strict=True)
        }

    def _check_traced(self) -> None:
        of_loss, of_update = self._compare(*self._traced)
        if not (of_loss <= _TOLERANCE and of_update <= _TOLERANCE):
            msg = (
                f"the traced step differs from Pyro's by {of_loss:.1e} in the loss and "
                f"{of_update:.1e} in the update, relatively. Does the program change between steps?"
            )
            raise NotStaticError(msg)

    def _check_compiled(self, gradient: Gradient, compiled: Callable[..., Any]) -> None:
        of_loss, of_update = self._compare(gradient, compiled)
        # The loss is a sum over all elements, whose rounding depends on the order of summation.
        values = self._state.values
        rounding = torch.finfo(values.dtype).eps * len(values) ** 0.5
        if not (of_loss <= max(_TOLERANCE, rounding) and of_update <= _COMPILED_TOLERANCE):
            msg = (
                f"the compiled step differs from the traced one by {of_loss:.1e} in the loss and "
                f"{of_update:.1e} in the update, relatively, which rounding does not explain"
            )
            raise NotStaticError(msg)

    def _compare(self, gradient: Gradient, step: Callable[..., Any]) -> tuple[float, float]:
        """Compare a step with Pyro's, on another batch, with the same noise; relative errors."""
        cut, feed = self._other, self._loss.feed
        # So high that the update is most of what is compared.
        rate = self._state.values.new_tensor(1e3)
        with poutine.block(), dry_run(self._loss.model.model, self._loss.guide):
            noise = torch.randn(gradient.noise_size, device="cpu").to(self._state.values)
            torch.manual_seed(0)
            with self._ranks.together(), FixedNoise(gradient, noise):
                expected = self._loss(*feed.batch(feed.inputs(cut)))
            parameters = list(self._parameters.values())
            gradients = torch.autograd.grad(
                expected, parameters, allow_unused=True, materialize_grads=True
            )
            total = torch.cat([part.reshape(-1) for part in gradients])
            total, expected = self._ranks.average(total, expected)
            # Of the size of the gradient, as after many steps: smaller ones would blow up rounding.
            square = (0.5 + torch.rand_like(total)) * total.square().max()
            state = self._state._replace(square=square, steps=self._state.steps + 3)
            torch.manual_seed(0)
            with torch.no_grad():
                *after, loss = step(*self._inputs(gradient, state, rate, noise, cut))
        expected_after = update(state, total, rate, self._clip_norm)
        data = self._loss.batches.tensors.values()
        most_rows = max((len(tensor) for tensor in data if tensor.dim()), default=1)
        # Each row adds about a nat to the loss, and rows of either sign can add up to nothing.
        of_loss = _relative_error(loss, expected.detach(), at_least=most_rows)
        of_update = max(map(_relative_error, after[:3], expected_after[:3]))
        # Of the rank with the largest ones, so that all go on in the same way.
        found = torch.tensor(self._ranks.gather((of_loss, of_update)), device="cpu").amax(0)
        return float(found[0]), float(found[1])


def _move(clip_norm: float | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    *state, total, rate = inputs
    return tuple(update(AdamState(*state), total, rate, clip_norm))


def _relative_error(values: Tensor, expected: Tensor, at_least: float = 1e-30) -> float:
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=at_least))
