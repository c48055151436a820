"""Whether the losses of ranks, each of rows of its own, have that of all rows as their mean."""

from __future__ import annotations

import torch
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from torch import Tensor

from pyro_bmr.programs.batches import BatchModel
from pyro_bmr.programs.enumeration import is_enumerated
from pyro_bmr.programs.ranks import Ranks
from pyro_bmr.programs.trial_runs import is_about, log_density, scaled_log_density

_NOT_LINEAR = (RenyiELBO, ReweightedWakeSleep, TraceTailAdaptive_ELBO, TraceTMC_ELBO)
# Rows that a model is tried on; an even number, for halves.
_ROWS = 8


def check_linear(estimator: ELBO) -> None:
    """Raise a TypeError if a loss is not linear in the log likelihood of the rows."""
    if isinstance(estimator, _NOT_LINEAR):
        msg = (
            f"got estimator={type(estimator).__name__} and a mesh: the mean of its losses in the "
            "processes is not that of all rows. Expected a loss that is linear in the log "
            "likelihood, such as 'global' or Trace_ELBO"
        )
        raise TypeError(msg)


def check_shards(model: BatchModel, ranks: Ranks) -> None:
    """Let all ranks scale the same sites, and raise a ValueError if their losses do not add up.

    Rows have to be independent given the latent sites, and the models of all ranks to be the same.
    """
    if ranks.size == 1:
        return
    model.scaled = model.scaled.union(*ranks.gather(model.scaled))
    with ranks.together():
        _check_sum(model)
        rows = _few_rows(model)
        batch = model.batches.take(rows)
    given = ranks.give([tensor.cpu() for tensor in batch])
    with ranks.together():
        if len(given) != len(batch):
            msg = f"got {len(batch)} tensors, and rank 0 got {len(given)}. Expected as many in all"
            raise ValueError(msg)
        found = _densities(model, tuple(g.to(own) for g, own in zip(given, batch, strict=True)))
    _compare(ranks.gather(found))


def _few_rows(model: BatchModel) -> Tensor:
    """Choose rows from all over the shard, or a batch if the model takes no other number."""
    if not model.takes_any:
        return torch.arange(model.batches.batch_size or 1, device="cpu")
    count = min(_ROWS, model.batches.size // 2 * 2)
    places = torch.linspace(0, model.batches.size - 1, count, dtype=torch.float64, device="cpu")
    return places.round().long()


def _check_sum(model: BatchModel) -> None:
    rows = _few_rows(model)
    if not model.takes_any or len(rows) < 4:
        return
    whole = model.run(model.batches.take(rows))
    if any(map(is_enumerated, whole.values())):
        return
    # Noise of the model itself, as of dropout, leaves nothing to compare.
    again = model.run(model.batches.take(rows), seed=1)
    halves = [model.run(model.batches.take(half)) for half in (rows[::2], rows[1::2])]
    for name in sorted(model.scaled | model.own):
        sites = [run.get(name) for run in (whole, again, *halves)]
        if None in sites:
            continue
        total, other, *parts = (float(log_density(site)) for site in sites)
        size = sum(map(abs, parts))
        if is_about(total, other) and not is_about(total, sum(parts), size):
            msg = (
                f"at {name!r} the log density of {len(rows)} rows is {total:.6g}, and that of "
                f"their halves {parts[0]:.6g} and {parts[1]:.6g}, so that the rows of one process "
                "tell of those of the others, which it does not see. Expected a sum over rows that "
                "are independent given the latent sites: scale data beforehand, by what all rows "
                "have, take sums of rows and no means, and set batch normalisation to eval(); or "
                "train in one process"
            )
            raise ValueError(msg)


def _densities(model: BatchModel, batch: tuple[Tensor, ...]) -> dict[str, float | None]:
    """Return the log densities of sites at given rows; None of those that change by themselves."""
    runs = model.run(batch), model.run(batch)
    first, again = ({n: float(scaled_log_density(s)) for n, s in run.items()} for run in runs)
    return {n: f if is_about(f, again.get(n, torch.nan)) else None for n, f in first.items()}


def _compare(found: list[dict[str, float | None]]) -> None:
    first, *others = found
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            here, there = first.get(name, torch.nan), other.get(name, torch.nan)
            if here is None or there is None or is_about(here, there):
                continue
            msg = (
                f"ranks 0 and {rank} have different models: at the same rows and the same values "
                f"of latent sites, the log density of {name!r} is {here:.6g} and "
                f"{there:.6g}. Expected the same one in all ranks: the rows of a rank come as "
                "arguments of fit, not from a closure, a module or pyro.condition, and what is "
                "computed from data, such as a mean, is that of all rows"
            )
            raise ValueError(msg)
