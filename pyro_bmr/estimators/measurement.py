"""Measuring the free energy by Monte Carlo."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, read_count, read_optional
from pyro_bmr.estimators.elbos import UnbiasedELBO
from pyro_bmr.estimators.meter import Meter
from pyro_bmr.estimators.parts_of_rows import BLOCK
from pyro_bmr.guides.common_noise import CommonNoise, NoiseCoupling, draw_noise
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.batches import BatchModel
from pyro_bmr.programs.data import read_data
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.failures import running
from pyro_bmr.programs.pairs import Pair, check_programs
from pyro_bmr.programs.ranks import Ranks, read_ranks
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.streams import Stream

if TYPE_CHECKING:
    # Of which a build of torch may have none.
    from torch.distributed.device_mesh import DeviceMesh


@alone("free_energy")
def free_energy(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    batch_size: int | None = None,
    estimator: ELBO | None = None,
    mesh: DeviceMesh | None = None,
) -> tuple[float, float]:
    r"""Estimate the free energy of a model and its guide, in nats.

    .. math:: F = -E_q[\ln p(y \mid \theta)] + KL(q \,\|\, p)

    Parameters
    ----------
    model, guide : callable
        A pair, such as those of a `Reduction`.
    *args
        Of both: all of the data.
    kwargs : mapping, optional
        Keyword arguments of both.
    num_samples : int
        How many estimates to average; two or more.
    batch_size : int, optional
        Rows that are measured at a time, where memory does not take all of them: each estimate is
        then the sum over all batches, in random order, with draws of their own. Fewer than eight
        batches are measured as one, and so are rows of which the log likelihood is not a sum,
        which is seen from eight batches at once.
    estimator : ELBO, optional
        By default one that is unbiased for every reparameterised guide; those of `pyro.infer` work
        too.
    mesh : DeviceMesh, optional
        Of the processes that measure together, as in `fit`: each gives rows of its own, and all get
        the free energy of all rows.

    Returns
    -------
    mean, error : float
        The estimate and its standard error, in nats.

    Raises
    ------
    ValueError
        If a number makes no sense, or if an ``estimator`` is given with ``batch_size`` or ``mesh``.
    RuntimeError
        If ranks of a mesh have different guides, or priors that depend on their rows. What goes
        wrong in one of them is raised in all, with its number.

    Warns
    -----
    UserWarning
        If this is one of many processes, and no mesh is given.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal, init_to_value
    >>> def model():
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(2.0))
    >>> start = init_to_value(values={"w": torch.tensor(1.0)})
    >>> mean, error = free_energy(model, AutoNormal(model, init_loc_fn=start, init_scale=0.5**0.5))
    >>> exact = -dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()
    >>> abs(mean - exact) < 4 * error
    True
    """
    ranks = read_ranks(mesh, verb="free_energy")
    with ranks.together():
        given = args, kwargs, num_samples, batch_size, estimator
        return _measure(model, guide, *given, ranks)


def _measure(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    num_samples: int,
    batch_size: int | None,
    estimator: ELBO | None,
    ranks: Ranks,
) -> tuple[float, float]:
    check_programs("free_energy", model, guide)
    num_samples = read_count("num_samples", num_samples, 2)
    if estimator is not None:
        check_kind("estimator", estimator, ELBO, "a loss such as pyro.infer.Trace_ELBO()")
    data = read_data(model, guide, args, kwargs)
    batch_size = read_optional(batch_size, read_count, "batch_size")
    if batch_size is None and not ranks.are_many:
        return mean_and_error(free_energy_draws(model, guide, *data, num_samples, estimator))
    if estimator is not None:
        other = "a mesh" if batch_size is None else f"batch_size={batch_size}"
        msg = (
            f"free_energy got {other} and an estimator. Expected one of them: batches, and the "
            "rows of many ranks, are measured by the unbiased estimator"
        )
        raise ValueError(msg)
    return _measure_parts((model, guide), *data, num_samples, batch_size or sys.maxsize, ranks)


def _measure_parts(
    pair: Pair,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    batch_size: int,
    ranks: Ranks,
) -> tuple[float, float]:
    """Average passes over the rows, each of them one estimate."""
    seed = ranks.give(int(torch.randint(2**31, (), device="cpu")))
    with explained_refusals(*pair, args, kwargs), running("the model and its guide", args, kwargs):
        meter = Meter(pair, args, kwargs, batch_size, seed, None, ranks)
        count = BLOCK * math.ceil(meter.parts * num_samples / BLOCK)
        draws = meter.measure(pair, 0, count, {})
    passes = draws[: meter.parts * num_samples].reshape(num_samples, meter.parts)
    return mean_and_error(passes.mean(1))


def free_energy_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    estimator: ELBO | None = None,
) -> Tensor:
    """Return single estimates of the free energy in nats, of shape ``(num_samples,)``, float64."""
    elbo = UnbiasedELBO() if estimator is None else estimator
    named = running("the model and its guide", args, kwargs)
    with explained_refusals(model, guide, args, kwargs), named:
        losses = [float(elbo.loss(model, guide, *args, **kwargs)) for _ in range(num_samples)]
    return torch.tensor(losses, dtype=torch.float64, device="cpu")


def common_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    *,
    seed: int = 0,
    couplings: Mapping[str, NoiseCoupling] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return estimates of both parts of F that those of similar programs can be subtracted from.

    Draw :math:`i` has a seed of its own, so that programs that draw alike get the same random
    numbers, and the error of their difference is that of what they do differently. Nothing outside
    is changed. ``couplings`` are those of `CommonNoise`, for correlated posteriors; ``advance`` is
    called after each draw. An estimate that is NaN or infinite is a ValueError.

    Complexity and accuracy have the shape ``(num_samples,)``, in nats and float64; F is their
    difference.
    """  # noqa: DOC201, DOC501
    num_samples = read_count("num_samples", num_samples, 2)
    elbo, terms = UnbiasedELBO(), []
    generator = torch.Generator(device="cpu").manual_seed(seed)
    seeds = torch.randint(2**31, (num_samples,), generator=generator, device="cpu")
    with poutine.block(), dry_run(model, guide), torch.no_grad():
        # The first call learns the structure, for which it draws.
        with explained_refusals(model, guide, args, kwargs):
            elbo.split_loss(model, guide, *args, **kwargs)
        for one in seeds.tolist():
            pyro.set_rng_seed(one)
            with CommonNoise(draw_noise(couplings or {}, one)):
                terms.append(elbo.split_loss(model, guide, *args, **kwargs))
            advance()
    complexity, accuracy = torch.tensor(terms, dtype=torch.float64, device="cpu").unbind(-1)
    bad = int((~(complexity - accuracy).isfinite()).sum())
    if bad:
        msg = (
            f"the free energy is NaN or infinite in {bad} of {num_samples} draws. Expected finite "
            "ones: look for NaN in the data, or for observations that the model cannot make"
        )
        raise ValueError(msg)
    return complexity, accuracy


def streamed_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    stream: Stream,
    num_samples: int,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Return what `common_draws` does, of all rows of a stream, which are read once.

    A batch of B of N rows stands for all of them, and counts B / N.
    """  # noqa: DOC201
    batches = stream.batches
    batch_model = BatchModel(model, batches)
    parts = torch.arange(batches.size, device="cpu").split(batches.batch_size or 1)
    totals = torch.zeros(2, num_samples, dtype=torch.float64, device="cpu")
    for rows in parts:
        args, kwargs = batches.arguments(stream.read(rows))
        found = common_draws(batch_model, guide, args, kwargs, num_samples, **how)
        totals += len(rows) / batches.size * torch.stack(found)
    complexity, accuracy = totals
    return complexity, accuracy


def mean_and_error(draws: Tensor) -> tuple[float, float]:
    """Return the mean of independent draws, and its standard error."""
    return float(draws.mean()), float(draws.std() / len(draws) ** 0.5)
