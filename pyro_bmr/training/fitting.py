"""`fit`: stochastic variational inference in compiled steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_bmr.display import progress_bar, warn
from pyro_bmr.estimators.elbos import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.calls import without_inference_mode
from pyro_bmr.programs.dry_run import unconstrained_parameters
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.training.compilation import NotStaticError
from pyro_bmr.training.steps import CompiledSteps, EagerSteps, Loss, Steps, all_rows

ESTIMATORS: Mapping[str, Callable[[], ELBO]] = {
    "global": GlobalELBO,
    "local": LocalELBO,
    "moments": MomentsELBO,
}

# Tracing and compiling take about as long as this many steps of Pyro.
_COMPILE_FROM = 1000


@alone("fit")
@torch.inference_mode(False)
@torch.enable_grad()
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
        If NaN or inf in the data reach the loss or its gradient; with batches, if the data differ
        in length, are not all arguments, or are fewer than a batch; if the model observes nothing,
        or if an option makes no sense.
    FloatingPointError
        If the loss or its gradient becomes NaN or infinite; the guide is left in the last finite
        state.

    Warns
    -----
    UserWarning
        If the model scales what it observes by a constant of about N / B itself, or is trained
        without compiling.

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
    check_programs("fit", model, guide)
    _check_options(num_epochs, lr, estimator, clip_norm, patience)
    batches = Batches(*without_inference_mode(args, kwargs or {}), batch_size)
    batches.check()
    if seed is not None:
        pyro.set_rng_seed(seed)
    elbo = ESTIMATORS[estimator]() if isinstance(estimator, str) else estimator
    with explained_refusals(model, guide, batches.args, batches.kwargs):
        batch_model = BatchModel(model, batches)
        _warn_of_scales(batch_model)
        loss = Loss(elbo, batch_model, guide, batches)
        parameters = _parameters(loss)
    steps_per_epoch = math.ceil(batches.size / (batch_size or 1))
    total = num_epochs * steps_per_epoch
    history: list[float] = []
    with progress_bar("epochs", progress) as bar:
        task = bar.add_task("compiling", total=num_epochs, note="")
        steps = _make_steps(loss, parameters, clip_norm, compile and total >= _COMPILE_FROM)
        bar.update(task, description="training")
        try:
            while len(history) < num_epochs and not _has_stalled(history, patience):
                begin = len(history) * steps_per_epoch
                done = [(begin + i) / total for i in range(steps_per_epoch)]
                rates = [lr(t) if callable(lr) else lr for t in done]
                history.append(float(steps.run(_shuffled(batches), rates).mean()))
                bar.update(task, advance=1, note=f"F = {history[-1]:.1f}")
        finally:
            steps.finish()
    steps.verify()
    return history


def _make_steps(
    loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None, compile: bool
) -> Steps:
    if compile:
        try:
            return CompiledSteps(loss, parameters, clip_norm)
        except NotStaticError as reason:
            warn(f"training without compiling, which is slow: {reason}")
    return EagerSteps(loss, clip_norm)


def _parameters(loss: Loss) -> dict[str, Tensor]:
    """Run model and guide once, so that they have their parameters."""
    missing = loss.batches.describe_missing()
    try:
        with poutine.trace(param_only=True) as capture:
            value = loss(*loss.batches.take_first())
    except ValueError as error:
        if not missing:
            raise
        reason = str(error).partition("\n")[0].rstrip(":")
        raise _refuse_missing(missing, f"a first step stops with ValueError: {reason}") from error
    parameters = unconstrained_parameters(capture.trace)
    if not parameters:
        msg = "model and guide have no parameters. Expected a guide to train, such as AutoNormal"
        raise ValueError(msg)
    made = sorted(name for name, one in parameters.items() if one.is_inference())
    if made:
        msg = (
            f"got the parameters {made} made in torch.inference_mode(), which torch does not "
            "change outside of it. Expected a model and a guide that are called for the first time "
            "outside of it; torch.no_grad() does no harm"
        )
        raise ValueError(msg)
    if missing:
        _check_finite(value, parameters, missing)
    return parameters


def _check_finite(loss: Tensor, parameters: Mapping[str, Tensor], missing: str) -> None:
    """Raise a ValueError if what is missing in the data reaches the loss or its gradient."""
    if not loss.isfinite():
        raise _refuse_missing(missing, f"the free energy is {loss.item()}")
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and not gradient.isfinite().all():
            reason = f"the free energy is finite, but its gradient for {name!r} is not"
            raise _refuse_missing(missing, reason)


def _refuse_missing(missing: str, reason: str) -> ValueError:
    return ValueError(
        f"got {missing}; {reason}. Expected numbers, or a model that leaves them out: put numbers "
        "in their place before it computes with them, y.where(seen, 0.0), and mask what comes of "
        "these, pyro.poutine.mask(mask=seen); or leave such rows out"
    )


def _warn_of_scales(model: BatchModel) -> None:
    for name, scale in model.doubled.items():
        warn(
            f"the model has a scale of {scale:.4g} at the observed site {name!r}, about rows / "
            "batch, by which fit scales what a model observes: together, each observation counts "
            f"{scale:.4g} times. Expected one of the two: leave the scale out of the model, let it "
            "follow the batch, poutine.scale(scale=num_rows / len(x)), or train with batch_size="
            "None"
        )


def _shuffled(batches: Batches) -> tuple[Tensor, ...]:
    rows = all_rows(batches)
    order = torch.randperm(len(rows), device="cpu").to(rows.device)
    return order.split(batches.batch_size or len(rows))


def _has_stalled(history: Sequence[float], patience: int | None) -> bool:
    if patience is None or len(history) < 2 * patience:
        return False
    return sum(history[-patience:]) >= sum(history[-2 * patience : -patience])


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
            f"got lr={lr!r}. Expected a number, or a function of the fraction of the training "
            "done, such as lambda done: 0.01 * (1 - done)"
        )
        raise TypeError(msg)
    positive = {"num_epochs": num_epochs, "clip_norm": clip_norm, "patience": patience}
    positive |= {} if callable(lr) else {"lr": lr}
    for name, value in positive.items():
        if value is not None and not value > 0:
            msg = f"got {name}={value!r}. Expected a positive number"
            raise ValueError(msg)
