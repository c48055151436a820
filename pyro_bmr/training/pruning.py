"""`prune`: fit, reduce, refit, until nothing more falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from rich.table import Table
from torch import Tensor, nn

from pyro_bmr.display import render
from pyro_bmr.estimators.measurement import common_draws, mean_and_error
from pyro_bmr.guides.common_noise import Coupling, couple
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.programs.dry_run import dry_run, find_modules, unconstrained_parameters
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.wrappers import unwrap
from pyro_bmr.reduction import LayerSummary, Reduction, SiteSummary, reduce
from pyro_bmr.selection.groups import Grouping, elements
from pyro_bmr.selection.selections import Selection, by_evidence
from pyro_bmr.training.checkpoints import load_checkpoint, save_checkpoint
from pyro_bmr.training.fitting import fit


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
) -> Pruning:
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
    Pruning
        The kept model and guide, and what happened in each round.

    Raises
    ------
    ValueError
        As `fit` and `reduce`; or if the checkpoint is of another run.

    References
    ----------
    Beckers et al. (2022), "Principled Pruning of Bayesian Neural Networks through Variational
    Free Energy Minimization", arXiv:2210.09134, algorithm 1.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)
    >>> x = torch.randn(50, 3)
    >>> result = prune(model, AutoNormal(model), x, x[:, 0], num_epochs=300, lr=0.02)
    >>> result.reduction.masks["w"]
    tensor([ True, False, False])
    """
    if keep not in {"best", "last"}:
        msg = f"got keep={keep!r}. Expected 'best' or 'last'"
        raise ValueError(msg)
    if num_samples < 2:
        msg = f"got num_samples={num_samples}. Expected 2 or more, for a standard error"
        raise ValueError(msg)
    program = _Program(model, args, dict(kwargs or {}), num_samples)
    names = [sites] if isinstance(sites, str) else sites and list(sites)
    full_model = unwrap(model, PrunedModel)

    def reduced(
        parent: Any, chosen: Selection, among: Grouping | Sequence[Grouping] = elements
    ) -> Reduction:
        return reduce(
            parent,
            model=full_model,
            args=args,
            kwargs=program.kwargs,
            sites=names,
            groups=among,
            select=chosen,
        )

    run = {
        "guide": type(guide).__name__,
        "data": [_fingerprint(value) for value in (*args, *program.kwargs.values())],
        "num_epochs": num_epochs,
        "refit_epochs": refit_epochs,
        "keep": keep,
        "num_samples": num_samples,
        "seed": seed,
        "select": _fingerprint(select),
        "groups": _fingerprint(groups),
        "chosen sites": None if names is None else sorted(names),
        **{name: _fingerprint(v) for name, v in fit_options.items() if name not in _FREE},
    }
    path = None if checkpoint is None else Path(checkpoint)

    def save(last: _State, best: _State) -> None:
        if path is not None:
            states = {"last": _packed(last), "best": _packed(best)}
            save_checkpoint(path, run, {**states, "guide": _tensors(guide)})

    if path is not None and path.exists():
        program.call(guide)
        run["sites"] = _shapes(guide, Origin(full_model, args, program.kwargs))
        saved = load_checkpoint(path, run)
        _load_tensors(guide, saved["guide"])
        last, best = (_unpacked(saved[name], guide, reduced) for name in ("last", "best"))
        program.set_values(last.values)
    else:
        if seed is not None:
            pyro.set_rng_seed(seed)
        fit(model, guide, *args, kwargs=kwargs, num_epochs=num_epochs, **fit_options)
        run["sites"] = _shapes(guide, Origin(full_model, args, program.kwargs))
        last = best = program.measured(reduced(guide, _keep_all), ())
        save(last, best)
    while len(last.rounds) <= max_rounds:
        reduction = reduced(last.reduction.guide, select, groups)
        if reduction.sparsity == last.reduction.sparsity:
            break
        masks = reduction.model.masks.by_site()
        after_masking = program.draws(reduction, _couple(last.reduction, masks))
        epochs = refit_epochs or num_epochs
        pair = reduction.model, reduction.guide
        fit(*pair, *args, kwargs=kwargs, num_epochs=epochs, **fit_options)
        realised = mean_and_error(after_masking - last.draws)
        last = program.measured(reduction, last.rounds, realised)
        if last.rounds[-1].free_energy <= best.rounds[-1].free_energy:
            best = last
        save(last, best)
    kept = best if keep == "best" else last
    program.set_values(kept.values)
    return Pruning(kept.reduction, last.rounds, kept.rounds[-1].index)


@dataclass(frozen=True)
class Round:
    """One round of `prune`: what was predicted, and what came of it.

    Parameters
    ----------
    index : int
        0 for the first training, in which nothing is pruned.
    sparsity : float
        Fraction of all elements that are pruned by now.
    predicted : float
        ΔF of this round's reduction in nats, in closed form.
    realised, realised_error : float
        Measured change of F by the reduction itself, before training again, with its standard
        error.
    free_energy, free_energy_error : float
        Measured F after training, with its standard error.

    Examples
    --------
    >>> Round(1, 0.9, -150.0, -120.0, 1.0, 1450.0, 0.5).sparsity
    0.9
    """

    index: int
    sparsity: float
    predicted: float
    realised: float
    realised_error: float
    free_energy: float
    free_energy_error: float


@dataclass(frozen=True, eq=False)
class Pruning:
    """What `prune` returns: the kept state, and the way there.

    Parameters
    ----------
    reduction : Reduction
        The last reduction of the kept state, with the guide trained after it.
    rounds : tuple of Round
        All rounds, also those after the kept one.
    kept_round : int
        Which round the state is of.

    Examples
    --------
    >>> from pyro_bmr.reduction import SiteSummary
    >>> reduction = Reduction(None, None, {}, {}, (SiteSummary("w", (4,), 1, -2.5),))
    >>> print(Pruning(reduction, (Round(0, 0.75, 0.0, 0.0, 0.0, 9.0, 0.1),), 0))
    75.0% pruned, F = 9.0 ± 0.1 nats after round 0
    ...
    """

    reduction: Reduction
    rounds: tuple[Round, ...]
    kept_round: int

    @property
    def model(self) -> PrunedModel:
        """The pruned model."""
        return self.reduction.model

    @property
    def guide(self) -> PrunedGuide:
        """The trained guide of the pruned model."""
        return self.reduction.guide

    @property
    def sparsity(self) -> float:
        """Fraction of all elements that are pruned."""
        return self.reduction.sparsity

    @property
    def free_energy(self) -> float:
        """Measured free energy of the kept state in nats."""
        return self.rounds[self.kept_round].free_energy

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per round.

        Returns
        -------
        DataFrame
            Indexed by round; the columns are those of `Round`, in nats.
        """
        return pd.DataFrame([asdict(r) for r in self.rounds]).set_index("index")

    def to_arviz(self, *args: Any, **kwargs: Any) -> Any:
        """Draw from the kept state, for ArviZ; see `pyro_bmr.Reduction.to_arviz`.

        Parameters
        ----------
        *args, **kwargs
            As there.

        Returns
        -------
        InferenceData or DataTree
            The group ``bmr`` is of the last reduction, after which the guide was trained.
        """
        return self.reduction.to_arviz(*args, **kwargs)

    def __rich__(self) -> Table:
        table = Table(title=self._title(), title_justify="left")
        for column in ("round", "pruned", "ΔF predicted", "ΔF realised", "F after training"):
            table.add_column(column, justify="right")
        for r in self.rounds:
            first = r.index == 0
            table.add_row(
                f"{r.index}{' (kept)' if r.index == self.kept_round else ''}",
                f"{r.sparsity:.1%}",
                "" if first else f"{r.predicted:+.1f}",
                "" if first else f"{r.realised:+.1f} ± {r.realised_error:.1f}",
                f"{r.free_energy:.1f} ± {r.free_energy_error:.1f}",
            )
        return table

    def __repr__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        return f"<p>{self._title()}</p>{self.summary().round(3).to_html()}"

    def _title(self) -> str:
        kept = self.rounds[self.kept_round]
        return (
            f"{self.sparsity:.1%} pruned, F = {kept.free_energy:.1f} ± "
            f"{kept.free_energy_error:.1f} nats after round {kept.index}"
        )


@dataclass(frozen=True)
class _State:
    """All that the loop knows after a round."""

    reduction: Reduction
    rounds: tuple[Round, ...]
    draws: Tensor
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Program:
    """The user's model with its arguments."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    num_samples: int

    def call(self, guide: Callable[..., Any]) -> None:
        """Give a guide its parameters."""
        with poutine.block(), torch.no_grad():
            guide(*self.args, **self.kwargs)

    def draws(self, reduction: Reduction, couplings: Mapping[str, Coupling]) -> Tensor:
        """Measure F, always with the same random numbers, so that differences have less noise."""
        pair = reduction.model, reduction.guide
        complexity, accuracy = common_draws(
            *pair, self.args, self.kwargs, self.num_samples, couplings=couplings
        )
        return complexity - accuracy

    def measured(
        self,
        reduction: Reduction,
        rounds: tuple[Round, ...],
        realised: tuple[float, float] = (0.0, 0.0),
    ) -> _State:
        draws = self.draws(reduction, _couple(reduction))
        this = Round(
            len(rounds),
            reduction.sparsity,
            reduction.delta_f,
            *realised,
            *mean_and_error(draws),
        )
        values = {name: value.detach().clone() for name, value in self._values().items()}
        return _State(reduction, (*rounds, this), draws, values)

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Put the model's own parameters and buffers back to those of a state."""
        for name, value in self._values().items():
            value.copy_(values[name])

    def _values(self) -> dict[str, Tensor]:
        with dry_run(self.model), torch.no_grad(), poutine.trace(param_only=True) as capture:
            self.model(*self.args, **self.kwargs)
            parameters = unconstrained_parameters(capture.trace)
        buffers = {
            f"buffer {i} {name}": buffer
            for i, module in enumerate(find_modules(self.model))
            for name, buffer in module.named_buffers()
        }
        return parameters | buffers


# Options that change the result by no more than other random numbers would.
_FREE = {"compile", "progress"}


def _couple(reduction: Reduction, masks: Mapping[str, Tensor] | None = None) -> dict[str, Coupling]:
    return couple((part.factor() for part in reduction.guide.parts), masks)


def _keep_all(scores: Any) -> dict[str, Tensor]:
    return dict(scores.kept)


def _shapes(guide: Any, origin: Origin) -> dict[str, tuple[int, ...]]:
    return {s.name: tuple(s.shape) for factor in read_guide(guide, origin) for s in factor.sites}


def _fingerprint(value: Any) -> Any:
    """Return something short that tells one option from another, also in another process."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [*value.shape, sha256(content).hexdigest()]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_fingerprint(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *map(_fingerprint, vars(value).values())]
    captured = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    constants = getattr(getattr(value, "__code__", None), "co_consts", ())
    numbers = [constant for constant in constants if isinstance(constant, int | float)]
    name = getattr(value, "__qualname__", type(value).__name__)
    return [name, *numbers, *map(_fingerprint, captured)]


def _tensors(guide: Any) -> dict[str, Tensor]:
    return dict(guide.state_dict()) if isinstance(guide, nn.Module) else {}


def _load_tensors(guide: Any, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(guide, nn.Module):
        guide.load_state_dict(dict(tensors))


def _packed(state: _State) -> dict[str, Any]:
    reduction = state.reduction
    return {
        "masks": dict(reduction.masks),
        "scores": dict(reduction.scores),
        "sites": [asdict(site) for site in reduction.sites],
        "layers": [asdict(layer) for layer in reduction.layers],
        "guide": _tensors(reduction.guide),
        "rounds": [asdict(r) for r in state.rounds],
        "draws": state.draws,
        "values": dict(state.values),
    }


def _unpacked(
    saved: Mapping[str, Any], guide: Any, reduced: Callable[[Any, Selection], Reduction]
) -> _State:
    like = next(iter(_tensors(guide).values()), torch.zeros(()))
    masks, scores = (
        {name: tensor.to(like.device) for name, tensor in saved[key].items()}
        for key in ("masks", "scores")
    )
    reduction = reduced(guide, lambda _: masks)
    _load_tensors(reduction.guide, saved["guide"])
    sites = tuple(SiteSummary(**row) for row in saved["sites"])
    layers = tuple(LayerSummary(**row) for row in saved.get("layers", ()))
    return _State(
        replace(reduction, scores=scores, sites=sites, layers=layers),
        tuple(Round(**row) for row in saved["rounds"]),
        saved["draws"],
        saved["values"],
    )
