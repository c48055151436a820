"""Pyro's own steps of training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from typing_extensions import override

from pyro_bmr.programs.dry_run import unconstrained_parameters
from pyro_bmr.programs.failures import running
from pyro_bmr.training.saved_parameters import moments, pack_parameter, unpack_parameters
from pyro_bmr.training.steps import Loss, Steps, blown_up


class EagerSteps(Steps):
    """Pyro's own steps, whose parameters may come and go."""

    def __init__(
        self, loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None
    ) -> None:
        self._loss = loss
        # A guide that sets itself up reads them in another order than later.
        self._order = tuple(parameters)
        self._clip_norm = clip_norm
        self._parameters: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    @override
    def run(self, cuts: Iterable[Any], rates: Sequence[float]) -> Tensor:
        losses, feed = [], self._loss.feed
        for step, (cut, rate) in enumerate(zip(cuts, rates, strict=True)):
            batch = feed.batch(feed.inputs(cut))
            called = running("the model and its guide", *self._loss.batches.arguments(batch))
            try:
                with called, poutine.trace(param_only=True) as capture:
                    loss = self._loss(*batch)
            except ValueError as error:
                if not ((_is_of_nan(error) or self._culprits()) and self._may_blow_up()):
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

    @override
    def pack(self) -> dict[str, Any]:
        rows = []
        for name, parameter in self._parameters.items():
            known = {} if self._adam is None else self._adam.state.get(parameter, {})
            means = known.get("exp_avg"), known.get("exp_avg_sq")
            rows.append(pack_parameter(name, parameter, *means, float(known.get("step", 0.0))))
        return {"parameters": rows, "steps_done": self.steps_done, "noise": []}

    @override
    def go_on_from(self, packed: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        own = unpack_parameters(packed["parameters"], parameters)
        adam = self._optimizer(own, rate=0.0)
        for parameter, mean, square, steps in moments(packed["parameters"], own):
            step = torch.tensor(steps, device="cpu")
            adam.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        self._before = {n: p.detach().clone() for n, p in own.items()}
        self.steps_done = packed["steps_done"]

    def _optimizer(self, parameters: Mapping[str, Tensor], rate: float) -> torch.optim.Adam:
        parameters = {n: parameters[n] for n in (*self._order, *parameters) if n in parameters}
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
        culprits = self._culprits()
        self._restore()
        return self._fail(step, culprits)

    def _may_blow_up(self) -> bool:
        return bool(self._before or self._loss.batches.describe_missing())

    def _culprits(self) -> list[str]:
        return blown_up(self._parameters) or blown_up(
            {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        )

    @torch.no_grad()
    def _restore(self) -> None:
        for name, value in self._before.items():
            self._parameters[name].copy_(value)


def _is_of_nan(error: ValueError) -> bool:
    """Tell whether Pyro's validation has noticed NaN or inf before the loss is of them."""
    text = str(error)
    return (
        type(error) is ValueError
        and "invalid values" in text
        and bool(re.search(r"nan|inf\b", text))
    )
