"""Steps of training: Pyro's own, or compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn
from typing_extensions import override

from pyro_bmr.display import warn
from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.dry_run import dry_run, unconstrained_parameters
from pyro_bmr.training.adam import AdamState, update
from pyro_bmr.training.compilation import (
    FixedNoise,
    Gradient,
    NotStaticError,
    compile_step,
    make_step,
    trace_gradient,
)
from pyro_bmr.training.normal_source import NormalSource

_TOLERANCE = 1e-5
# Squares of larger parameters overflow in float32.
_HUGE = 1e18
_STEPS, _NUMBERS = 64, 1 << 23


@dataclass(frozen=True)
class Loss:
    """The free energy as a function of a batch, in nats."""

    elbo: ELBO
    model: BatchModel
    guide: Callable[..., Any]
    batches: Batches

    def __call__(self, *batch: Tensor) -> Tensor:
        """Estimate F, to be differentiated, on what `Batches.take` returned."""
        args, kwargs = self.batches.arguments(batch)
        return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)


class Steps(ABC):
    """Steps of training that move the parameters of a guide."""

    steps_done = 0
    _loss: Loss

    @abstractmethod
    def run(self, rows: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
        """Take a step for each batch of rows, and return the losses."""

    @abstractmethod
    def finish(self) -> None:
        """Leave the parameters in the guide."""

    @abstractmethod
    def verify(self) -> None:
        """Warn if the steps no longer are those of the program."""

    def _fail(self, step: int, culprits: Sequence[str]) -> FloatingPointError:
        blown = f"{list(culprits)} blew up" if culprits else "no parameter is out of range"
        missing = self._loss.batches.describe_missing()
        found = f"; there are {missing}, which the model has to mask" if missing else ""
        return FloatingPointError(
            "the loss or its gradient became NaN or infinite at step "
            f"{self.steps_done + step}; {blown}. The guide was left in its last finite state. "
            "Expected finite losses: try a smaller lr, clip_norm=, a smaller init_scale of the "
            f"guide, or look for extreme values in the data{found}"
        )


class EagerSteps(Steps):
    """Pyro's own steps, whose parameters may come and go."""

    def __init__(self, loss: Loss, clip_norm: float | None) -> None:
        self._loss = loss
        self._clip_norm = clip_norm
        self._parameters: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    @override
    def run(self, rows: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
        losses = []
        for step, (batch, rate) in enumerate(zip(rows, rates, strict=True)):
            try:
                with poutine.trace(param_only=True) as capture:
                    loss = self._loss(*self._loss.batches.take(batch))
            except ValueError as error:
                # Pyro's validation notices what is out of range before the loss is NaN.
                if not (self._before or self._loss.batches.describe_missing()):
                    raise
                raise self._restored(step) from error
            adam = self._optimizer(unconstrained_parameters(capture.trace), rate)
            adam.zero_grad()
            loss.backward()
            if not loss.isfinite():
                raise self._restored(step)
            self._before = {n: p.detach().clone() for n, p in self._parameters.items()}
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters.values(), self._clip_norm)
            try:
                adam.step()
            except BaseException:
                # An interrupt may come between two parameters.
                self._restore()
                raise
            losses.append(loss.detach())
        if not all(p.isfinite().all() for p in self._parameters.values()):
            raise self._restored(len(losses) - 1)
        self.steps_done += len(losses)
        return torch.stack(losses)

    @override
    def finish(self) -> None:
        pass

    @override
    def verify(self) -> None:
        pass

    def _optimizer(self, parameters: Mapping[str, Tensor], rate: float) -> torch.optim.Adam:
        new = [p for name, p in parameters.items() if name not in self._parameters]
        self._parameters |= parameters
        if self._adam is None:
            self._adam = torch.optim.Adam(new)
        elif new:
            self._adam.add_param_group({"params": new})
        for group in self._adam.param_groups:
            group["lr"] = rate
        return self._adam

    def _restored(self, step: int) -> FloatingPointError:
        culprits = _blown_up(self._parameters) or _blown_up(
            {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        )
        self._restore()
        return self._fail(step, culprits)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, value in self._before.items():
            self._parameters[name].copy_(value)


class CompiledSteps(Steps):
    """Compiled steps, with all parameters in one vector.

    A batch of another size than the first, the last one of an epoch, goes through a traced graph of
    its own as it is: compiling that too would take longer than it saves.
    """

    def __init__(
        self, loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None
    ) -> None:
        self._loss = loss
        self._parameters = dict(parameters)
        self._clip_norm = clip_norm
        if len({(p.dtype, p.device) for p in parameters.values()}) > 1:
            msg = "its parameters have several dtypes or devices"
            raise NotStaticError(msg)
        values = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        self._state = self._before = AdamState.start(values)
        self._functions = {}
        first = all_rows(loss.batches)[: loss.batches.batch_size]
        gradient, step = self._function(first)
        rate, noise = values.new_zeros(()), values.new_empty(gradient.noise_size)
        compiled = compile_step(step, self._inputs(gradient, self._state, rate, noise, first))
        self._first_size = len(first)
        self._functions[self._first_size] = gradient, compiled
        self._check(gradient, compiled)
        last = first[: len(all_rows(loss.batches)) % len(first) or len(first)]
        sizes = [self._function(rows)[0].noise_size for rows in (first, last)]
        # The losses of a block of steps are looked at together, and its noise is kept until then.
        self._block = max(1, min(_STEPS, _NUMBERS // max(1, *sizes)))
        self._noise = NormalSource(self._block, max(sizes), values)

    @override
    def run(self, rows: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
        losses = []
        for start in range(0, len(rows), self._block):
            part = slice(start, start + self._block)
            losses.append(self._run_block(rows[part], rates[part]))
            self.steps_done += len(losses[-1])
        return torch.cat(losses)

    @override
    @torch.no_grad()
    def finish(self) -> None:
        for name, value in self._split(self._state).items():
            self._parameters[name].copy_(value)

    @override
    def verify(self) -> None:
        try:
            self._check(*self._functions[self._first_size])
        except NotStaticError as reason:
            warn(
                f"the program changed while it was trained, which fit did not follow: {reason} "
                "Train with compile=False"
            )

    @torch.no_grad()
    def _run_block(self, rows: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
        start = (self._before, self._state)
        noise = self._noise.draw(len(rows))
        steps = list(zip(rows, self._state.values.new_tensor(rates), noise, strict=True))
        losses = [self._advance(*step) for step in steps]
        finite = torch.stack(losses).isfinite()
        if not finite.all():
            self._before, self._state = start
            bad = int(finite.to(torch.uint8).argmin())
            for step in steps[:bad]:
                self._advance(*step)
            last_finite = self._before
            culprits = _blown_up(self._split(self._state))
            self._advance(*steps[bad])
            culprits = culprits or _blown_up(self._split(self._state))
            self._state = last_finite
            raise self._fail(bad, culprits)
        if not self._state.values.isfinite().all():
            culprits = _blown_up(self._split(self._state))
            self._state = self._before
            raise self._fail(len(steps) - 1, culprits)
        return torch.stack(losses)

    def _advance(self, rows: Tensor, rate: Tensor, noise: Tensor) -> Tensor:
        gradient, step = self._function(rows)
        *state, loss = step(*self._inputs(gradient, self._state, rate, noise, rows))
        self._before, self._state = self._state, AdamState(*state)
        return loss

    def _function(self, rows: Tensor) -> tuple[Gradient, Callable[..., Any]]:
        """Return the traced gradient and the step for a batch of this size."""
        if len(rows) not in self._functions:
            parameters = list(self._parameters.values())
            gradient = trace_gradient(self._loss, parameters, self._loss.batches.take(rows))
            update = make_step(gradient, [p.shape for p in parameters], self._clip_norm)
            before_batch = 6 + len(gradient.constants)

            def step(*inputs: Tensor) -> tuple[Tensor, ...]:
                rows, *data = inputs[before_batch:]
                return update(*inputs[:before_batch], *self._loss.batches.pick(data, rows))

            self._functions[len(rows)] = gradient, step
        return self._functions[len(rows)]

    def _inputs(
        self, gradient: Gradient, state: AdamState, rate: Tensor, noise: Tensor, rows: Tensor
    ) -> list[Tensor]:
        noise = noise[: gradient.noise_size]
        data = self._loss.batches.tensors.values()
        return [*state, rate, noise, *gradient.constants, rows, *data]

    def _split(self, state: AdamState) -> dict[str, Tensor]:
        parts = state.values.split([p.numel() for p in self._parameters.values()])
        return {
            name: part.view(p.shape)
            for (name, p), part in zip(self._parameters.items(), parts, strict=True)
        }

    def _check(self, gradient: Gradient, step: Callable[..., Any]) -> None:
        """Compare a compiled step with Pyro's, on another batch, with the same noise."""
        rows = all_rows(self._loss.batches).flip(0)[: self._loss.batches.batch_size]
        # So high that the update is most of what is compared.
        rate = self._state.values.new_tensor(1e3)
        with poutine.block(), dry_run(self._loss.model.model, self._loss.guide):
            noise = torch.randn(gradient.noise_size, device="cpu").to(self._state.values)
            torch.manual_seed(0)
            with FixedNoise(gradient, noise):
                expected = self._loss(*self._loss.batches.take(rows))
            parameters = list(self._parameters.values())
            gradients = torch.autograd.grad(
                expected, parameters, allow_unused=True, materialize_grads=True
            )
            total = torch.cat([part.reshape(-1) for part in gradients])
            # Of the size of the gradient, as after many steps: smaller ones would blow up rounding.
            square = (0.5 + torch.rand_like(total)) * total.square().max()
            state = self._state._replace(square=square, steps=self._state.steps + 3)
            torch.manual_seed(0)
            with torch.no_grad():
                *after, loss = step(*self._inputs(gradient, state, rate, noise, rows))
        expected_after = update(state, total, rate, self._clip_norm)
        data = self._loss.batches.tensors.values()
        most_rows = max((len(tensor) for tensor in data if tensor.dim()), default=1)
        errors = [
            # Each row adds about a nat to the loss, and rows of either sign can add up to nothing.
            _relative_error(loss, expected.detach(), at_least=most_rows),
            *map(_relative_error, after[:3], expected_after[:3]),
        ]
        # The loss is a sum over all elements, whose rounding depends on the order of summation.
        rounding = torch.finfo(total.dtype).eps * len(total) ** 0.5
        if not (errors[0] <= max(_TOLERANCE, rounding) and max(errors[1:]) <= _TOLERANCE):
            msg = (
                f"the compiled step differs from Pyro's by {errors[0]:.1e} in the loss and "
                f"{max(errors[1:]):.1e} in the update, relatively. Does the program change between "
                "steps?"
            )
            raise NotStaticError(msg)


def all_rows(batches: Batches) -> Tensor:
    """Return the numbers of all rows, from 0, on the device of the data."""
    device = next((t.device for t in batches.tensors.values()), None)
    return torch.arange(batches.size, device=device)


def _blown_up(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not (tensor.abs() < _HUGE).all()]


def _relative_error(values: Tensor, expected: Tensor, at_least: float = 1e-30) -> float:
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=at_least))
