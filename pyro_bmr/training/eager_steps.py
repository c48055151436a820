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
from pyro_bmr.programs.ranks import Ranks
from pyro_bmr.training.feeds import Cut
from pyro_bmr.training.saved_parameters import moments, pack_parameter, unpack_parameters
from pyro_bmr.training.steps import Loss, Steps, blown_up


class EagerSteps(Steps):
    """Pyro's own steps, whose parameters may come and go."""

    def __init__(
        self, loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None, ranks: Ranks
    ) -> None:
        self._loss = loss
        self._ranks = ranks
        # A guide that sets itself up reads them in another order than later.
        self._order = tuple(parameters)
        # What ranks average the gradients of.
        self._shared = dict(parameters)
        self._clip_norm = clip_norm
        self._parameters: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._adam: torch.optim.Adam | None = None

    @override
    def run(self, cuts: Iterable[Cut], rates: Sequence[float]) -> Tensor:
        losses = []
        for step, (cut, rate) in enumerate(zip(cuts, rates, strict=True)):
            try:
                loss, adam = self._differentiate(cut, rate, step)
            except Exception as error:
                self._give_up(error)
                raise
            loss = self._average(loss)
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
            losses.append(loss)
        if not all(p.isfinite().all() for p in self._parameters.values()):
            raise self._restored(len(losses) - 1)
        self.steps_done += len(losses)
        return torch.stack(losses)

    def _differentiate(self, cut: Cut, rate: float, step: int) -> tuple[Tensor, torch.optim.Adam]:
        """Leave the gradients at the parameters, and return the loss."""
        feed = self._loss.feed
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
        late = sorted(self._parameters.keys() - self._shared.keys())
        if self._ranks.are_many and late:
            msg = f"got {late}, which came into being after the first step. Expected them before"
            raise ValueError(msg)
        adam.zero_grad()
        loss.backward()
        return loss.detach(), adam

    def _average(self, loss: Tensor) -> Tensor:
        """Average gradients and loss over ranks; an error in one of them is that of all."""
        if not self._ranks.are_many:
            return loss
        *parts, loss = self._ranks.average([*self._gradients(), loss])
        if not loss.isfinite():
            self._ranks.raise_first(None)
        for parameter, part in zip(self._shared.values(), parts, strict=True):
            parameter.grad = part
        return loss

    def _give_up(self, error: Exception) -> None:
        """Take part in what the other ranks wait for, and tell them of an error."""
        if self._ranks.are_many:
            gradients = self._gradients()
            self._ranks.average([*gradients, gradients[0].new_full((), torch.nan)])
            self._ranks.raise_first(error)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._shared.values()]

    @override
    def renew_noise(self) -> None:
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
