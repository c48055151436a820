"""`fit`: stochastic variational inference in compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_path,
)
from pyro_bmr.display import progress_bar, warn
from pyro_bmr.files.whole_files import check_file
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.batches import BatchModel
from pyro_bmr.programs.dry_run import unconstrained_parameters
from pyro_bmr.programs.failures import running
from pyro_bmr.programs.fingerprints import fingerprint, fingerprint_run
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.programs.rank_checks import check_linear, check_shards
from pyro_bmr.programs.ranks import Ranks, read_ranks
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.undoing import remember
from pyro_bmr.training.checkpoint_files import CheckpointFile
from pyro_bmr.training.compilation import NotStaticError
from pyro_bmr.training.compiled_steps import CompiledSteps
from pyro_bmr.training.eager_steps import EagerSteps
from pyro_bmr.training.epochs import Callback, Epoch
from pyro_bmr.training.feeds import Feed, Shard, find_facts, read_feed
from pyro_bmr.training.keeping import TRAINING, Keeper
from pyro_bmr.training.options import Options, read_options
from pyro_bmr.training.precision import products
from pyro_bmr.training.steps import Loss, Steps

if TYPE_CHECKING:
    # Of which a build of torch may have none.
    from torch.distributed.device_mesh import DeviceMesh

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
    precision: str | None = None,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    callback: Callback | None = None,
    compile: bool = True,
    progress: bool = True,
    mesh: DeviceMesh | None = None,
    noise: str = "own",
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
    precision : str, optional
        Of products of float32 matrices, as of `torch.set_float32_matmul_precision`: ``"highest"``,
        ``"high"`` (TensorFloat32, where a GPU has it) or ``"medium"`` (bfloat16). None leaves
        torch's switches as they are; steps are checked at full precision whatever they say.
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
    mesh : DeviceMesh, optional
        Of the processes that train together, of one dimension, from `torch.distributed`. Each calls
        `fit` with rows of its own, which have to be independent given the latent sites;
        ``batch_size`` is that of all, and the guide of each is left at the same parameters, which
        begin as those of the first. Rank 0 writes the checkpoint, from which any number of
        processes go on, with the same rows among them.
    noise : str
        With a mesh: each process draws its ``"own"`` weights, which varies less, or all draw the
        ``"same"`` ones, which trains as one process with all rows does.

    Returns
    -------
    list of float
        The mean of the loss over each epoch, in nats.

    Raises
    ------
    ValueError
        If NaN or inf in the data reach the loss or its gradient; with batches, if the data differ
        in length, are not all arguments, or are fewer than a batch; if the model observes nothing,
        if an option makes no sense, or if the checkpoint is damaged, or of another run. With
        batches, if a prior depends on the rows of a batch; with a mesh, if F of all rows is not the
        sum of what single rows add, or models differ between ranks.
    TypeError
        If model or guide are no programs, an option is of another kind, or the rows of a dataset
        are not counted, as those of an ``IterableDataset``.
    RuntimeError
        If ranks of a mesh have different parameters. What goes wrong in one of them is raised in
        all, with its number.
    FloatingPointError
        If the loss or its gradient becomes NaN or infinite; the guide is left in the last finite
        state.

    Warns
    -----
    UserWarning
        If the model scales what it observes by a constant of about N / B itself, or is trained
        without compiling; if this is one of many processes, and no mesh is given.

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
    ranks = read_ranks(mesh, noise, "fit")
    with ranks.together():
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
            precision=precision,
            seed=seed,
            callback=callback,
            compile=compile,
            progress=progress,
        )
    told: dict[str, Any] = {"callback": callback, "compile": compile, "progress": progress}
    if ranks.are_many:
        others = {"compile": compile, "noise": noise, "checkpoint": checkpoint is not None}
        ranks.check_same("options", dict(fingerprint(vars(options) | others)))
    feed = read_feed(model, guide, args, kwargs, options.batch_size, ranks)
    keeper = _keeper(checkpoint, model, guide, feed, options, ranks)
    if options.seed is not None:
        pyro.set_rng_seed(options.seed)
    ranks.start_noise()
    return run_training(model, guide, feed, options, keeper, ranks, **told)


def run_training(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    feed: Feed,
    options: Options,
    keeper: Keeper,
    ranks: Ranks,
    *,
    callback: Callback | None,
    compile: bool,
    progress: bool,
) -> list[float]:
    """Do what `fit` does, with what it has read, from where the generators are."""
    data = feed.batches.args, feed.batches.kwargs
    with ranks.together(), explained_refusals(model, guide, *data):
        if ranks.size > 1:
            check_linear(options.estimator)
        batch_model = BatchModel(model, feed.batches, feed.shards)
        _warn_of_scales(batch_model)
        loss = Loss(options.estimator, batch_model, guide, feed)
        parameters = _parameters(loss)
    ranks.start(parameters)
    check_shards(batch_model, ranks)
    num_epochs, patience = options.num_epochs, options.patience
    total = num_epochs * feed.steps
    history = keeper.losses
    left = len(history) < num_epochs and not _has_stalled(history, patience)
    noise, shown = ranks.own_noise(parameters), progress and ranks.is_first
    with products(options.precision), noise, progress_bar("epochs", shown) as bar:
        task = bar.add_task("compiling", total=num_epochs, completed=len(history), note="")
        compile = compile and left and total >= _COMPILE_FROM
        steps = _make_steps(loss, parameters, options.clip_norm, ranks, compile)
        with ranks.together():
            keeper.go_on(steps, parameters, (model, guide))
        bar.update(task, description="training")
        while len(history) < num_epochs and not _has_stalled(history, patience):
            begin = len(history) * feed.steps
            rates = [options.lr((begin + i) / total) for i in range(feed.steps)]
            cuts = _begin_epoch(feed, steps, ranks)
            history.append(float(steps.run(cuts, rates).mean()))
            bar.update(task, advance=1, note=f"F = {history[-1]:.1f}")
            with ranks.together():
                keeper.keep(history, steps, parameters, (model, guide))
                if callback is not None:
                    callback(Epoch(len(history) - 1, history[-1], guide))
            ranks.check_values(parameters)
    if left:
        with ranks.together():
            keeper.keep(history, steps, parameters, (model, guide), last=True)
    steps.verify()
    return history


def _begin_epoch(feed: Feed, steps: Steps, ranks: Ranks) -> Iterable[Any]:
    """Return the batches of an epoch; each rank has an order of its own, and noise as it says."""
    if isinstance(feed, Shard):
        order, noise = ranks.draw_seeds()
        feed.generator.manual_seed(order)
        torch.manual_seed(noise)
        steps.renew_noise()
    return feed.epoch()


def _keeper(
    checkpoint: str | Path | None,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    feed: Feed,
    options: Options,
    ranks: Ranks,
) -> Keeper:
    if checkpoint is None:
        return Keeper()
    generators = (*feed.generators, *ranks.generators)
    with ranks.together():
        file = CheckpointFile(check_file(checkpoint), "fit")
        facts = find_facts(feed.batches, ranks, feed.facts)
        run = fingerprint_run(guide, facts, vars(options))
        saved = file.read(TRAINING) if ranks.is_first else None
        if saved is not None:
            saved.check_run(run)
    write = partial(file.write, run) if ranks.is_first else None
    content = ranks.give(None if saved is None else saved.content)
    if content is None:
        return Keeper(write=write, generators=generators)
    return Keeper(content, write, remember(model, guide), generators)


def _make_steps(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    clip_norm: float | None,
    ranks: Ranks,
    compile: bool,
) -> Steps:
    if compile:
        try:
            return CompiledSteps(loss, parameters, clip_norm, ranks)
        except NotStaticError as reason:
            warn(f"training without compiling, which is slow: {reason}")
    return EagerSteps(loss, parameters, clip_norm, ranks)


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
    if value.is_complex():
        msg = (
            f"the free energy came out as a complex number, of {value.dtype}. Expected "
            "observations of real numbers: observe real and imaginary parts as two"
        )
        raise ValueError(msg)
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
