"""`prune`: fit, reduce, refit, until nothing more falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pyro

from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.programs.wrappers import unwrap
from pyro_bmr.reduction import reduce
from pyro_bmr.results import Reduction
from pyro_bmr.selection.groups import Grouping, elements
from pyro_bmr.selection.selections import Selection, by_evidence
from pyro_bmr.training.checkpoints import Checkpoint
from pyro_bmr.training.fingerprints import fingerprint_run
from pyro_bmr.training.fitting import fit
from pyro_bmr.training.states import Program


def prune(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_epochs: int,
    refit_epochs: int | None = None,
    max_rounds: int = 20,
    select: Selection = by_evidence(),
    groups: Grouping | Sequence[Grouping] = elements,
    sites: Iterable[str] | None = None,
    keep: str = "best",
    num_samples: int = 100,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    **fit_options: Any,
) -> Reduction:
    r"""Train, reduce, train what remains, and so on until a round prunes nothing more.

    The guide is trained in place by `fit`; each reduction has a guide of its own. After every round
    the free energy is measured, so that the ΔF that was predicted stands beside the one that came
    true. The state with the lowest measured free energy is kept.

    Parameters
    ----------
    model, guide : callable
        A Pyro model and its guide.
    *args
        Of both: all of the data.
    kwargs : mapping, optional
        Keyword arguments of both.
    num_epochs : int
        Passes over the data in the first training.
    refit_epochs : int, optional
        Passes over the data after each reduction; ``num_epochs`` by default.
    max_rounds : int
        Reductions at most.
    select, groups, sites
        As in `reduce`.
    keep : str
        ``"best"``: the state with the lowest measured free energy; ``"last"``: the last one, as in
        the paper.
    num_samples : int
        Draws to measure a free energy with; two or more.
    checkpoint : str or Path, optional
        A file that is written after every round. If it exists, the run goes on from there, and ends
        as it would have without the interruption.
    seed : int, optional
        For `pyro.set_rng_seed`.
    **fit_options
        ``batch_size``, ``lr``, ``estimator``, ``clip_norm``, ``patience``, ``compile`` and
        ``progress``, as in `fit`.

    Returns
    -------
    Reduction
        As of `reduce`, with ``rounds``: what happened in each. ``delta_f`` is the sum over the
        rounds up to the kept one, without what training added; ``scores`` are of the last of them.

    Raises
    ------
    ValueError
        As `fit` and `reduce`; or if the checkpoint is of another run.
    TypeError
        If an option is unknown, or ``model`` and ``guide`` are no programs.

    References
    ----------
    Beckers et al. (2022), "Principled Pruning of Bayesian Neural Networks through Variational
    Free Energy Minimization", arXiv:2210.09134, algorithm 1.

    Examples
    --------
    >>> import torch, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)
    >>> x = torch.randn(50, 3)
    >>> result = prune(model, AutoNormal(model), x, x[:, 0], num_epochs=300, lr=0.02)
    >>> result.masks["w"]
    tensor([ True, False, False])
    >>> result.kept_round.free_energy < result.rounds[0].free_energy
    True
    """
    check_programs("prune", model, guide)
    unknown = sorted(fit_options.keys() - _FIT_OPTIONS)
    if unknown:
        msg = (
            f"prune got the unknown options {unknown}. Expected its own, or those of fit; keywords "
            "of the model as in kwargs={'offset': offset}"
        )
        raise TypeError(msg)
    if keep not in {"best", "last"}:
        msg = f"got keep={keep!r}. Expected 'best' or 'last'"
        raise ValueError(msg)
    if num_samples < 2:
        msg = f"got num_samples={num_samples}. Expected 2 or more, for a standard error"
        raise ValueError(msg)
    program = Program(model, args, dict(kwargs or {}), num_samples)
    names = None if sites is None else sorted({sites} if isinstance(sites, str) else sites)
    full_model = unwrap(model, PrunedModel)

    def reduced(parent: Any, **options: Any) -> Reduction:
        told = {"kwargs": program.kwargs, "model": full_model, "sites": names}
        return reduce(parent, *args, **told, **options)

    def train(model: Any, guide: Any, num_epochs: int) -> None:
        fit(model, guide, *args, kwargs=program.kwargs, num_epochs=num_epochs, **fit_options)

    options: dict[str, Any] = {"num_epochs": num_epochs, "refit_epochs": refit_epochs}
    options |= {"num_samples": num_samples, "keep": keep, "seed": seed, **fit_options}
    options |= {"sites": names, "select": select, "groups": groups}
    run = fingerprint_run(guide, (*args, *program.kwargs.values()), options)
    path = None if checkpoint is None else Path(checkpoint)
    saved = Checkpoint(path, run, guide, program, full_model)
    if saved.exists():
        last, best = saved.load(reduced)
    else:
        if seed is not None:
            pyro.set_rng_seed(seed)
        train(model, guide, num_epochs)
        whole = reduced(guide, select=lambda scores: dict(scores.kept))
        last = best = program.start(whole, guide)
        saved.write(last, best)
    while len(last.rounds) <= max_rounds:
        reduction = reduced(last.reduction.guide, select=select, groups=groups)
        if reduction.sparsity == last.reduction.sparsity:
            break
        realised = program.measure_change(last, reduction)
        train(reduction.model, reduction.guide, refit_epochs or num_epochs)
        last = program.go_on(last, reduction, realised)
        best = last if last.free_energy <= best.free_energy else best
        saved.write(last, best)
    return program.finish(best if keep == "best" else last, last.rounds)


_FIT_OPTIONS = signature(fit).parameters.keys()
