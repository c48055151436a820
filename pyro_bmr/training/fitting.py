"""`fit`: stochastic variational inference in compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_function,
    check_kind,
    check_path,
    check_switch,
    read_count,
    read_optional,
    read_positive,
    read_seed,
    refuse,
)
from pyro_bmr.display import progress_bar, warn
from pyro_bmr.estimators.elbos import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.files.whole_files import check_file
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.calls import without_inference_mode
from pyro_bmr.programs.dry_run import unconstrained_parameters
from pyro_bmr.programs.failures import running
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.streams import read_stream_or_data
from pyro_bmr.programs.undoing import remember
from pyro_bmr.training.checkpoint_files import CheckpointFile
from pyro_bmr.training.compilation import NotStaticError
from pyro_bmr.training.compiled_steps import CompiledSteps
from pyro_bmr.training.eager_steps import EagerSteps
from pyro_bmr.training.epochs import Callback, Epoch
from pyro_bmr.training.feeds import Feed, Loaded, Rows
from pyro_bmr.training.fingerprints import fingerprint_run
from pyro_bmr.training.keeping import TRAINING, Keeper
from pyro_bmr.training.rates import Rate, read_rate
from pyro_bmr.training.steps import Loss, Steps

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
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    callback: Callback | None = None,
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
        Of both. With ``batch_size``, all tensors have a row for each observation. Arrays of numpy,
        pandas and xarray, and lists of numbers, become tensors of the dtype and on the device of
        the guide. Or a `torch.utils.data.Dataset` or ``DataLoader`` alone, for data that need not
        fit into memory: a tuple is a batch of ``args``, a mapping of ``kwargs``.
    kwargs : mapping, optional
        Keyword arguments of both.
    num_epochs : int
        Passes over the data.
    batch_size : int, optional
        Rows of a mini-batch, shuffled in every epoch; the last batch of an epoch may be smaller.
        Observed sites are scaled by N / B, unless the model has a sub-sampling plate, which is left
        alone. None gives every step all of the arguments. A loader has a size of its own.
    lr : float or callable
        Learning rate, or a function that gives it from the fraction of the training done, 0 to 1.
    estimator : str or ELBO
        ``"global"``, ``"local"`` or ``"moments"``: see `GlobalELBO`, `LocalELBO`, `MomentsELBO`.
        Losses of `pyro.infer` work too, without compiling.
    clip_norm : float, optional
        Longer gradients are shortened to this length.
    patience : int, optional
        Stop when F, averaged over so many epochs, is no lower than over as many epochs before.
    checkpoint : str or Path, optional
        A file that is written after epochs, as often as costs no more than a hundredth of the time,
        and at the end. If it exists, the training goes on from there, and ends, bit for bit, as it
        would have without the interruption.
    seed : int, optional
        For `pyro.set_rng_seed`.
    callback : callable, optional
        Called with an `Epoch` after each, such as ``lambda e: writer.add_scalar("F", e.loss,
        e.epoch)``. It may call functions of this package itself, but must not wait for another
        thread that does: these run one at a time.
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
        if an option makes no sense, or if the checkpoint is damaged, or of another run.
    TypeError
        If model or guide are no programs, an option is of another kind, or the rows of a dataset
        are not counted, as those of an ``IterableDataset``.
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
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    options = read_options(
        num_epochs=num_epochs,
        batch_size=batch_size,
        lr=lr,
        estimator=estimator,
        clip_norm=clip_norm,
        patience=patience,
        seed=seed,
        callback=callback,
        compile=compile,
        progress=progress,
    )
    feed = read_feed(model, guide, args, kwargs, options.batch_size)
    keeper = _keeper(checkpoint, model, guide, feed, options)
    told: dict[str, Any] = {"callback": callback, "compile": compile, "progress": progress}
    return run_training(model, guide, feed, options, keeper, **told)


def run_training(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    feed: Feed,
    options: Options,
    keeper: Keeper,
    *,
    callback: Callback | None,
    compile: bool,
    progress: bool,
) -> list[float]:
    """Do what `fit` does, with what it has read."""
    if options.seed is not None:
        pyro.set_rng_seed(options.seed)
    with explained_refusals(model, guide, feed.batches.args, feed.batches.kwargs):
        batch_model = BatchModel(model, feed.batches)
        _warn_of_scales(batch_model)
        loss = Loss(options.estimator, batch_model, guide, feed)
        parameters = _parameters(loss)
    num_epochs, patience = options.num_epochs, options.patience
    total = num_epochs * feed.steps
    history = keeper.losses
    left = len(history) < num_epochs and not _has_stalled(history, patience)
    with progress_bar("epochs", progress) as bar:
        task = bar.add_task("compiling", total=num_epochs, completed=len(history), note="")
        compile = compile and left and total >= _COMPILE_FROM
        steps = _make_steps(loss, parameters, options.clip_norm, compile)
        keeper.go_on(steps, parameters, (model, guide))
        bar.update(task, description="training")
        try:
            while len(history) < num_epochs and not _has_stalled(history, patience):
                begin = len(history) * feed.steps
                rates = [options.lr((begin + i) / total) for i in range(feed.steps)]
                history.append(float(steps.run(feed.epoch(), rates).mean()))
                bar.update(task, advance=1, note=f"F = {history[-1]:.1f}")
                keeper.keep(history, steps, parameters, (model, guide))
                if callback is not None:
                    steps.finish()
                    callback(Epoch(len(history) - 1, history[-1], guide))
        finally:
            steps.finish()
    if left:
        keeper.keep(history, steps, parameters, (model, guide), last=True)
    steps.verify()
    return history


def _keeper(
    checkpoint: str | Path | None,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    feed: Feed,
    options: Options,
) -> Keeper:
    if checkpoint is None:
        return Keeper()
    file = CheckpointFile(check_file(checkpoint), "fit")
    data = (*feed.batches.args, *feed.batches.kwargs.values(), *feed.facts)
    run = fingerprint_run(guide, data, vars(options))
    write, saved = partial(file.write, run), file.read(TRAINING)
    if saved is None:
        return Keeper(write=write, generators=feed.generators)
    saved.check_run(run)
    return Keeper(saved.content, write, remember(model, guide), feed.generators)


def read_feed(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: Any, batch_size: int | None
) -> Feed:
    """Read the data of a training."""
    data = read_stream_or_data(model, guide, args, kwargs, batch_size)
    if data.stream is not None:
        return Loaded(data.stream)
    batches = Batches(*without_inference_mode(data.args, data.kwargs), batch_size)
    batches.check()
    return Rows(batches)


def _make_steps(
    loss: Loss, parameters: Mapping[str, Tensor], clip_norm: float | None, compile: bool
) -> Steps:
    if compile:
        try:
            return CompiledSteps(loss, parameters, clip_norm)
        except NotStaticError as reason:
            warn(f"training without compiling, which is slow: {reason}")
    return EagerSteps(loss, parameters, clip_norm)


def _parameters(loss: Loss) -> dict[str, Tensor]:
    """Run model and guide once, so that they have their parameters."""
    missing = loss.batches.describe_missing()
    try:
        batch = loss.batches.take_first()
        called = running("the model and its guide", *loss.batches.arguments(batch))
        with called, poutine.trace(param_only=True) as capture:
            value = loss(*batch)
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


def _has_stalled(history: Sequence[float], patience: int | None) -> bool:
    if patience is None or len(history) < 2 * patience:
        return False
    return sum(history[-patience:]) >= sum(history[-2 * patience : -patience])


@dataclass(frozen=True)
class Options:
    """Options of `fit` that make sense."""

    num_epochs: int
    batch_size: int | None
    lr: Rate
    estimator: ELBO
    clip_norm: float | None
    patience: int | None
    seed: int | None


def read_options(
    *,
    num_epochs: Any,
    batch_size: Any,
    lr: Any,
    estimator: Any,
    clip_norm: Any,
    patience: Any,
    seed: Any,
    callback: Any,
    compile: Any,
    progress: Any,
) -> Options:
    """Read what a user passed, and raise an error that names what makes no sense."""
    check_switch("compile", compile)
    check_switch("progress", progress)
    if callback is not None:
        check_function("callback", callback, "a function of an epoch: its number, loss and guide")
    return Options(
        num_epochs=read_count("num_epochs", num_epochs),
        batch_size=read_optional(batch_size, read_count, "batch_size"),
        lr=read_rate(lr),
        estimator=_read_estimator(estimator),
        clip_norm=read_optional(clip_norm, read_positive, "clip_norm"),
        patience=read_optional(patience, read_count, "patience"),
        seed=None if seed is None else read_seed(seed),
    )


def _read_estimator(estimator: Any) -> ELBO:
    expected = f"one of {sorted(ESTIMATORS)}, or a loss such as pyro.infer.Trace_ELBO()"
    if isinstance(estimator, str):
        make = ESTIMATORS.get(estimator)
        return make() if make else refuse("estimator", estimator, expected)
    check_kind("estimator", estimator, ELBO, expected)
    return estimator
