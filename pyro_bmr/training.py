"""`fit`: stochastic variational inference in compiled steps."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from typing_extensions import override

from pyro_bmr.adam import AdamState, update
from pyro_bmr.batches import Batches, BatchModel
from pyro_bmr.compilation import (
    FixedNoise,
    Gradient,
    NotStaticError,
    compile_step,
    make_step,
    trace_gradient,
)
from pyro_bmr.dry_run import dry_run, unconstrained_parameters
from pyro_bmr.estimators import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.normal_source import NormalSource

ESTIMATORS: Mapping[str, Callable[[], ELBO]] = {
    "global": GlobalELBO,
    "local": LocalELBO,
    "moments": MomentsELBO,
}

# Tracing and compiling take about as long as this many steps of Pyro.
_COMPILE_FROM = 1000
_TOLERANCE = 1e-5
# Squares of larger parameters overflow in float32.
_HUGE = 1e18
_STEPS, _NUMBERS = 64, 1 << 23


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_epochs: int,
    batch_size: int | None = None,
    lr: float | Callable[[float], float] = 1e-2,
    estimator: str | ELBO = "global",
    clip_norm: float | None = None,
    patience: int | None = None,
    seed: int | None = None,
    compile: bool = True,
    progress: bool = True,
) -> list[float]:
    r"""Train a guide: minimise the free energy by Adam, in compiled steps.

    .. math:: F = -\frac{N}{B} \sum_{i \in \text{batch}} E_q[\ln p(y_i \mid x_i, \theta)]
              + KL(q \,\|\, p)

    Does what a loop over `pyro.infer.SVI.step` does, many times faster: the tensor operations of
    model and guide are traced once, and compiled together with the update. A step is checked
    against Pyro's before it is used. A program whose operations change from step to step, or a
    machine without a C++ compiler, is trained without compiling, and a warning says why.

    Parameters
    ----------
    model, guide : callable
        A Pyro model and its guide.
    *args
        Of both. With ``batch_size``, all tensors have a row for each observation.
    kwargs : mapping, optional
        Keyword arguments of both.
    num_epochs : int
        Passes over the data.
    batch_size : int, optional
        Rows of a mini-batch, shuffled in every epoch; the last batch of an epoch may be smaller.
        Observed sites are scaled by N / B, unless the model has a sub-sampling plate, which is left
        alone. None gives every step all of the arguments.
    lr : float or callable
        Learning rate, or a function that gives it from the fraction of the training done, 0 to 1.
    estimator : str or ELBO
        ``"global"``, ``"local"`` or ``"moments"``: see `GlobalELBO`, `LocalELBO`, `MomentsELBO`.
        Losses of `pyro.infer` work too, without compiling.
    clip_norm : float, optional
        Longer gradients are shortened to this length.
    patience : int, optional
        Stop when F, averaged over so many epochs, is no lower than over as many epochs before.
    seed : int, optional
        For `pyro.set_rng_seed`.
    compile : bool
        False takes Pyro's steps as they are, as do runs of less than a thousand steps.
    progress : bool
        Show a progress bar, if there is a terminal or a notebook.

    Returns
    -------
    list of float
        The mean of the loss over each epoch, in nats.

    Raises
    ------
    ValueError
        If the data hold NaN or inf, if they differ in length where there are batches, if a batch is
        larger than the data, if the model observes nothing, or if an option makes no sense.
    FloatingPointError
        If the loss becomes NaN or infinite; the guide is left in the last finite state.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    >>> guide = AutoNormal(model)
    >>> losses = fit(model, guide, torch.tensor([4.0, 6.0]), num_epochs=300, lr=0.1)
    >>> round(guide.median()["mean"].item())
    5
    """
    _check_options(num_epochs, lr, estimator, clip_norm, patience)
    batches = Batches(args, dict(kwargs or {}), batch_size)
    batches.check()
    if seed is not None:
        pyro.set_rng_seed(seed)
    elbo = ESTIMATORS[estimator]() if isinstance(estimator, str) else estimator
    batch_model = BatchModel(model, batches)

    loss = _Loss(elbo, batch_model, guide, batches)
    parameters = _parameters(loss)
    steps_per_epoch = math.ceil(batches.size / (batch_size or 1))
    total = num_epochs * steps_per_epoch
    history: list[float] = []
    with _progress_bar(progress) as bar:
        task = bar.add_task("compiling", total=num_epochs, loss="")
        steps = _make_steps(loss, parameters, clip_norm, compile and total >= _COMPILE_FROM)
        bar.update(task, description="training")
        try:
            while len(history) < num_epochs and not _has_stalled(history, patience):
                begin = len(history) * steps_per_epoch
                done = [(begin + i) / total for i in range(steps_per_epoch)]
                rates = [lr(t) if callable(lr) else lr for t in done]
                history.append(float(steps.run(_shuffled(batches), rates).mean()))
                bar.update(task, advance=1, loss=f"F = {history[-1]:.1f}")
        finally:
            steps.finish()
    steps.verify()
    return history


@dataclass(frozen=True)
class _Loss:
    """The free energy as a function of a batch."""

    elbo: ELBO
    model: BatchModel
    guide: Callable[..., Any]
    batches: Batches

    def __call__(self, *batch: Tensor) -> Tensor:
        args, kwargs = self.batches.arguments(batch)
        return self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)


class _Steps(ABC):
    """Steps of training that move the parameters of a guide."""

    steps_done = 0

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
        return FloatingPointError(
            f"the loss became NaN or infinite at step {self.steps_done + step}; {blown}. The guide "
            "was left in its last finite state. Expected finite losses: try a smaller lr, "
            "clip_norm=, a smaller init_scale of the guide, or look for extreme values in the data"
        )


class _EagerSteps(_Steps):
    """Pyro's own steps, whose parameters may come and go."""

    def __init__(self, loss: _Loss, clip_norm: float | None) -> None:
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
                # Pyro's validation notices parameters out of range before the loss is NaN.
                if not self._before:
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
            adam.step()
            losses.append(loss.detach())
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
        with torch.no_grad():
            for name, value in self._before.items():
                self._parameters[name].copy_(value)
        return self._fail(step, culprits)


class _CompiledSteps(_Steps):
    """Compiled steps, with all parameters in one vector.

    A batch of another size than the first, the last one of an epoch, goes through a traced graph of
    its own as it is: compiling that too would take longer than it saves.
    """

    def __init__(
        self, loss: _Loss, parameters: Mapping[str, Tensor], clip_norm: float | None
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
        first = _all_rows(loss.batches)[: loss.batches.batch_size]
        gradient, step = self._function(first)
        rate, noise = values.new_zeros(()), values.new_empty(gradient.noise_size)
        compiled = compile_step(step, self._inputs(gradient, self._state, rate, noise, first))
        self._first_size = len(first)
        self._functions[self._first_size] = gradient, compiled
        self._check(gradient, compiled)
        last = first[: len(_all_rows(loss.batches)) % len(first) or len(first)]
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
            warnings.warn(
                f"the program changed while it was trained, which fit did not follow: {reason} "
                "Train with compile=False",
                stacklevel=3,
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
            last_finite, self._state = self._before, self._state
            culprits = _blown_up(self._split(self._state))
            self._advance(*steps[bad])
            culprits = culprits or _blown_up(self._split(self._state))
            self._state = last_finite
            raise self._fail(bad, culprits)
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
        rows = _all_rows(self._loss.batches).flip(0)[: self._loss.batches.batch_size]
        state = self._state
        state = state._replace(square=torch.rand_like(state.square), steps=state.steps + 3)
        rate = state.values.new_tensor(1e-3)
        with poutine.block(), dry_run(self._loss.model.model, self._loss.guide):
            noise = torch.randn(gradient.noise_size).to(state.values)
            torch.manual_seed(0)
            with torch.no_grad():
                *after, loss = step(*self._inputs(gradient, state, rate, noise, rows))
            torch.manual_seed(0)
            with FixedNoise(gradient, noise):
                expected = self._loss(*self._loss.batches.take(rows))
            parameters = list(self._parameters.values())
            gradients = torch.autograd.grad(
                expected, parameters, allow_unused=True, materialize_grads=True
            )
        total = torch.cat([part.reshape(-1) for part in gradients])
        expected_after = update(state, total, rate, self._clip_norm)
        errors = [
            _relative_error(loss, expected.detach()),
            *map(_relative_error, after[:3], expected_after[:3]),
        ]
        # The loss is a sum over all elements, whose rounding depends on the order of summation.
        rounding = torch.finfo(total.dtype).eps * len(total) ** 0.5
        if not (errors[0] <= max(_TOLERANCE, rounding) and max(errors[1:]) <= _TOLERANCE):
            msg = (
                f"the compiled step differs from Pyro's by {errors[0]:.1e} in the loss and "
                f"{errors[2]:.1e} in the gradient, relatively. Does the program change between "
                "steps?"
            )
            raise NotStaticError(msg)


def _make_steps(
    loss: _Loss, parameters: Mapping[str, Tensor], clip_norm: float | None, compile: bool
) -> _Steps:
    if compile:
        try:
            return _CompiledSteps(loss, parameters, clip_norm)
        except NotStaticError as reason:
            warnings.warn(f"training without compiling, which is slow: {reason}", stacklevel=3)
    return _EagerSteps(loss, clip_norm)


def _parameters(loss: _Loss) -> dict[str, Tensor]:
    """Run model and guide once, so that they have their parameters."""
    with poutine.trace(param_only=True) as capture:
        loss(*loss.batches.take(slice(loss.batches.batch_size)))
    parameters = unconstrained_parameters(capture.trace)
    if not parameters:
        msg = "model and guide have no parameters. Expected a guide to train, such as AutoNormal"
        raise ValueError(msg)
    return parameters


def _all_rows(batches: Batches) -> Tensor:
    device = next((t.device for t in batches.tensors.values()), None)
    return torch.arange(batches.size, device=device)


def _shuffled(batches: Batches) -> tuple[Tensor, ...]:
    rows = _all_rows(batches)
    order = torch.randperm(len(rows)).to(rows.device)
    return order.split(batches.batch_size or len(rows))


def _has_stalled(history: Sequence[float], patience: int | None) -> bool:
    if patience is None or len(history) < 2 * patience:
        return False
    return sum(history[-patience:]) >= sum(history[-2 * patience : -patience])


def _blown_up(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not (tensor.abs() < _HUGE).all()]


def _relative_error(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _progress_bar(wanted: bool) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} epochs  {task.fields[loss]}"),
        TimeRemainingColumn(),
        transient=True,
    )
    bar.disable = not (wanted and (bar.console.is_terminal or bar.console.is_jupyter))
    return bar


def _check_options(
    num_epochs: int, lr: Any, estimator: Any, clip_norm: float | None, patience: int | None
) -> None:
    if isinstance(estimator, str) and estimator not in ESTIMATORS:
        msg = (
            f"got estimator={estimator!r}. Expected one of {sorted(ESTIMATORS)}, or a loss such as "
            "pyro.infer.Trace_ELBO()"
        )
        raise ValueError(msg)
    if not (callable(lr) or isinstance(lr, int | float)):
        msg = (
            f"got lr={lr!r}. Expected a number, or a function of the fraction of the training done, "
            "such as lambda done: 0.01 * (1 - done)"
        )
        raise TypeError(msg)
    positive = {"num_epochs": num_epochs, "clip_norm": clip_norm, "patience": patience}
    positive |= {} if callable(lr) else {"lr": lr}
    for name, value in positive.items():
        if value is not None and not value > 0:
            msg = f"got {name}={value!r}. Expected a positive number"
            raise ValueError(msg)
