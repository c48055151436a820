"""Options of `fit`, as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO

from pyro_bmr.arguments.checks import (
    check_choice,
    check_function,
    check_kind,
    check_switch,
    read_count,
    read_optional,
    read_positive,
    read_seed,
    refuse,
)
from pyro_bmr.estimators.elbos import GlobalELBO, LocalELBO, MomentsELBO
from pyro_bmr.training.precision import PRECISIONS
from pyro_bmr.training.rates import Rate, read_rate

ESTIMATORS: Mapping[str, Callable[[], ELBO]] = {
    "global": GlobalELBO,
    "local": LocalELBO,
    "moments": MomentsELBO,
}


@dataclass(frozen=True)
class Options:
    """Options of `fit` that make sense."""

    num_epochs: int
    batch_size: int | None
    lr: Rate
    estimator: ELBO
    clip_norm: float | None
    patience: int | None
    precision: str | None
    seed: int | None


def read_options(
    *,
    num_epochs: Any,
    batch_size: Any,
    lr: Any,
    estimator: Any,
    clip_norm: Any,
    patience: Any,
    precision: Any,
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
        precision=_read_precision(precision),
        seed=None if seed is None else read_seed(seed),
    )


def _read_precision(precision: Any) -> str | None:
    if precision is not None:
        check_choice("precision", precision, PRECISIONS)
    return precision


def _read_estimator(estimator: Any) -> ELBO:
    expected = f"one of {sorted(ESTIMATORS)}, or a loss such as pyro.infer.Trace_ELBO()"
    if isinstance(estimator, str):
        make = ESTIMATORS.get(estimator)
        return make() if make else refuse("estimator", estimator, expected)
    check_kind("estimator", estimator, ELBO, expected)
    return estimator
