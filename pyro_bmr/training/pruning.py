"""`prune`: fit, reduce, refit, until nothing more falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import isfunction, signature
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_choice,
    check_function,
    check_path,
    read_count,
    read_keywords,
    read_names,
    read_optional,
)
from pyro_bmr.arguments.columns import read_columns
from pyro_bmr.files.whole_files import check_file
from pyro_bmr.guides.wrapped_guides import check_unweighted
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.batches import Batches
from pyro_bmr.programs.fingerprints import fingerprint, fingerprint_run
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.pairs import check_programs
from pyro_bmr.programs.ranks import read_ranks
from pyro_bmr.programs.streams import read_stream_or_data
from pyro_bmr.programs.wrappers import unwrap
from pyro_bmr.reduction import reduce_for
from pyro_bmr.results import Reduction
from pyro_bmr.selection.by_free_energy import by_free_energy
from pyro_bmr.selection.groups import Grouping, elements, list_groupings
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.selections import Selection, by_evidence
from pyro_bmr.training.checkpoint_files import UnusableError
from pyro_bmr.training.checkpoints import Checkpoint
from pyro_bmr.training.epochs import Callback, Epoch
from pyro_bmr.training.feeds import find_facts, read_feed
from pyro_bmr.training.fitting import fit, run_training
from pyro_bmr.training.keeping import Keeper
from pyro_bmr.training.options import read_options
from pyro_bmr.training.rates import hold_and_fall
from pyro_bmr.training.states import Program

if TYPE_CHECKING:
    # Of which a build of torch may have none.
    from torch.distributed.device_mesh import DeviceMesh


@alone("prune")
@torch.inference_mode(False)
@torch.enable_grad()
def prune(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_epochs: int,
    refit_epochs: int | None = None,
    max_rounds: int = 20,
    select: Selection | None = None,
    groups: Grouping | Sequence[Grouping] = elements,
    sites: Iterable[str] | None = None,
    algorithm: str = "measured",
    num_samples: int = 100,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    callback: Callback | None = None,
    mesh: DeviceMesh | None = None,
    noise: str = "own",
    **fit_options: Any,
) -> Reduction:
    r"""Train, reduce, train what remains, and so on as long as the free energy falls.

    The guide is trained in place by `fit`; each reduction has a guide of its own. What goes is
    measured, as in ``reduce(guide, x, y)``, and so is the free energy after each round: a round
    counts only if

    .. math:: F_\text{after training} \le F_\text{before the reduction}

    within two standard errors of the difference. Where a round prunes nothing more, or does not
    count, one is tried that drops all that the evidence says, since F may fall below what it was
    once the rest is trained, and then one that only trains; the run ends when F does not fall in
    that by more than two standard errors either.

    Parameters
    ----------
    model, guide : callable
        A Pyro model and its guide.
    *args
        Of both: all of the data, of the kinds that `fit` takes. Of a loader, F is measured on all
        rows, a batch at a time, which are read in this process.
    kwargs : mapping, optional
        Keyword arguments of both.
    num_epochs : int
        Passes over the data in the first training; 0 for a guide that has been trained.
    refit_epochs : int, optional
        Passes over the data after each reduction; ``num_epochs`` by default.
    max_rounds : int
        Reductions at most.
    select, groups, sites
        As in `reduce`; where a selection is given, nothing else drops anything.
    algorithm : str
        ``"measured"``: as above, and the learning rate of each training is constant over its first
        half and falls to a hundredth over the second, unless ``lr`` is a function. ``"paper"``:
        that of Beckers et al.: what the evidence says goes, every round counts, the learning rate
        is constant, and the run ends when a round prunes nothing more.
    num_samples : int
        How often all rows are measured, at most, for a free energy; two or more. Of 16,000 rows or
        more each once at first, in parts, and again as long as two standard errors leave open
        which of two free energies is lower.
    checkpoint : str or Path, optional
        A file that is written after every round and, as by `fit`, during training. If it exists,
        the run goes on from there, and ends as it would have without the interruption.
    seed : int, optional
        For `pyro.set_rng_seed`.
    callback : callable, optional
        As of `fit`, called after each epoch of each training.
    mesh, noise
        As of `fit`: many processes prune one guide, each with rows of its own. What goes is decided
        by the free energy of all rows, and all end with the same result.
    **fit_options
        ``batch_size``, ``lr``, ``estimator``, ``clip_norm``, ``patience``, ``precision``,
        ``compile`` and ``progress``, as in `fit`.

    Returns
    -------
    Reduction
        As of `reduce`, with ``rounds``: what happened in each, also in those that did not count.
        ``delta_f`` and ``realised`` are sums over the rounds that did, without what training added;
        ``scores`` are of the last of them.

    Raises
    ------
    ValueError
        As `fit` and `reduce`; or if the checkpoint is damaged, or of another run.
    TypeError
        If an option is unknown, or ``model`` and ``guide`` are no programs.
    RuntimeError
        If ranks of a mesh have different options, parameters, or priors that depend on their rows.
        What goes wrong in one of them is raised in all, with its number.

    Warns
    -----
    UserWarning
        As `fit` and `reduce`; if this is one of many processes, and no mesh is given.

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
    ranks = read_ranks(mesh, noise, "prune")
    with ranks.together():
        check_programs("prune", model, guide)
        check_unweighted(guide)
        unknown = sorted(fit_options.keys() - _FIT_DEFAULTS.keys())
        if unknown:
            msg = (
                f"prune got the unknown options {unknown}. Expected its own, or those of fit; "
                "keywords of the model as in kwargs={'offset': offset}"
            )
            raise TypeError(msg)
        check_choice("algorithm", algorithm, ("measured", "paper"))
        num_samples = read_count("num_samples", num_samples, 2)
        num_epochs = read_count("num_epochs", num_epochs, 0)
        refit_epochs = read_optional(refit_epochs, read_count, "refit_epochs")
        max_rounds = read_count("max_rounds", max_rounds, 0)
        names = read_names("sites", sites)
        names = None if names is None else tuple(sorted(set(names)))
        if select is not None:
            check_function("select", select, "a selection, such as pyro_bmr.by_evidence()")
        list_groupings(groups)
        if checkpoint is not None:
            check_path(checkpoint, "checkpoint")
        told = {**_FIT_DEFAULTS, "num_epochs": num_epochs or 1, "seed": seed, "callback": callback}
        told |= fit_options
        checked = read_options(**told)
        data = read_stream_or_data(model, guide, args, kwargs, checked.batch_size)
        given, keywords = data.args, data.kwargs
        if read_columns((*args, *read_keywords(kwargs).values())):
            # Tables as they are, with the names of their columns.
            given, keywords = args, read_keywords(kwargs)
        if data.stream is not None:
            given, keywords = (data.stream.loader,), read_keywords(kwargs)
            checked = replace(checked, batch_size=None)  # its loader has a size of its own
        ranks.check_no_loader(data.stream)
        program = Program(model, data.args, data.kwargs, num_samples, data.stream, ranks)
        full_model = unwrap(model, PrunedModel)

        if not (num_epochs or refit_epochs):
            msg = "got num_epochs=0 and no refit_epochs. Expected a number of epochs to train with"
            raise ValueError(msg)
        measured = algorithm == "measured"
        if select is None:
            measuring = by_free_energy(progress=told["progress"] and ranks.is_first)
            selections = (measuring, by_evidence()) if measured else (by_evidence(),)
        else:
            selections = (select,)
        if measured and not callable(told["lr"]):
            checked = replace(checked, lr=hold_and_fall(checked.lr(0.0)))
        epochs_done = count()

        def reduced(parent: Any, **options: Any) -> Reduction:
            how = {"groups": elements, "select": None, "ranks": ranks, **options}
            with torch.no_grad():
                return reduce_for("reduce", parent, given, keywords, full_model, names, **how)

        def train(model: Any, guide: Any, num_epochs: int, round: int) -> None:
            def tell(one: Epoch) -> None:
                if callback is not None:
                    callback(replace(one, epoch=next(epochs_done), round=round))

            feed = read_feed(model, guide, given, keywords, checked.batch_size, ranks)
            own = replace(checked, num_epochs=num_epochs, seed=None)
            shown = {name: told[name] for name in ("compile", "progress")}
            keeper = saved.keeper() or Keeper()
            with ranks.settled():
                run_training(model, guide, feed, own, keeper, ranks, callback=tell, **shown)

        options: dict[str, Any] = {**vars(checked), "num_epochs": num_epochs}
        options |= {
            "refit_epochs": refit_epochs,
            "num_samples": num_samples,
            "algorithm": algorithm,
        }
        options |= {"sites": names, "select": select, "groups": groups}
        if ranks.are_many:
            same = {**options, "max_rounds": max_rounds, "compile": told["compile"]}
            same["has a checkpoint"] = checkpoint is not None
            ranks.check_same("options", dict(fingerprint(same)))
        path, run = None, {}
        if checkpoint is not None:
            path = check_file(checkpoint)
            facts = () if data.stream is None else data.stream.facts
            facts = find_facts(Batches(data.args, data.kwargs, 1), ranks, facts)
            run = fingerprint_run(guide, facts, options)
        saved = Checkpoint(path, run, guide, program, full_model)
        if measured:
            selections = (*selections, _keep_all)
        state = saved.load(reduced)
        if state is None:
            if seed is not None:
                pyro.set_rng_seed(seed)
            ranks.start_noise()
            if num_epochs:
                train(model, guide, num_epochs, round=0)
            program.call(guide)
            # Labels name positive sites.
            labels = groups if isfunction(groups) else elements
            whole = reduced(guide, select=_keep_all, groups=labels)
            state = program.start(whole, guide), len(selections)
            saved.write(*state)
        last, left = state
        ahead = list(selections[max(0, len(selections) - left) :])
        while ahead and len(last.rounds) <= max_rounds:
            one = ahead.pop(0)
            reduction = reduced(last.reduction.guide, select=one, groups=groups)
            trains_only = one is _keep_all
            if reduction.sparsity == last.reduction.sparsity and not trains_only:
                continue
            realised = program.measure_change(last, reduction)
            epochs = refit_epochs or num_epochs
            try:
                train(reduction.model, reduction.guide, epochs, round=len(last.rounds))
            except BaseException as error:
                if not isinstance(error, UnusableError):
                    program.go_back(last)
                raise
            after = program.go_on(last, reduction, realised)
            if measured:
                last, after = program.settle(last, after)
            pays = after.is_lower(last) if trains_only else after.is_below(last)
            if measured and not pays:
                last = last.refuse(after)
                program.go_back(last)
            else:
                last, ahead = after, list(selections)
            saved.write(last, len(ahead))
        return program.finish(last)


def _keep_all(scores: Scores) -> dict[str, Tensor]:
    return dict(scores.kept)


_OF_FIT = signature(fit).parameters
_FIT_DEFAULTS = {name: _OF_FIT[name].default for name in signature(read_options).parameters}
