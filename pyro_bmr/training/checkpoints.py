"""Checkpoints of `prune`: what it needs to go on after any whole round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_bmr.files.whole_files import replace_file
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.programs.dry_run import find_tensors
from pyro_bmr.results import Reduction
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary
from pyro_bmr.training.states import Program, State

_FORMAT = 4


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The file of a run of `prune`, which ``run`` tells from others; no file without ``path``."""

    path: Path | None
    run: Mapping[str, Any]
    guide: Any
    program: Program
    model: Callable[..., Any]

    def exists(self) -> bool:
        """Tell whether there is something to go on from."""
        return self.path is not None and self.path.exists()

    def write(self, last: State) -> None:
        """Write a state, what identifies the run, and torch's random number generators."""
        if self.path is None:
            return
        state = {"last": _pack(last), "guide": self._find_tensors()}
        content = {
            "format": _FORMAT,
            "run": self._full_run,
            "state": state,
            "random": _generators(),
        }
        with replace_file(self.path) as unfinished:
            torch.save(content, unfinished)

    def load(self, reduce: Callable[..., Reduction]) -> State:
        """Go back to the last state; ``reduce`` takes a guide and a selection.

        Sets the guide, the model and torch's random number generators as they were. A file that is
        not a checkpoint, or is one of another run, raises a ValueError.
        """
        self.program.call(self.guide)
        saved = _read(cast(Path, self.path), self._full_run)
        with torch.no_grad():
            for name, tensor in self._find_tensors().items():
                tensor.copy_(saved["guide"][name])
        last = _unpack(saved["last"], self.guide, reduce)
        self.program.go_back(last)
        return last

    def _find_tensors(self) -> dict[str, Tensor]:
        """Find those of the guide that came in, also where it is a function."""
        if isinstance(self.guide, nn.Module):
            return _tensors(self.guide)
        args, kwargs = self.program.args, self.program.kwargs
        return find_tensors(partial(self.guide, *args, **kwargs), [self.guide])

    @cached_property
    def _full_run(self) -> dict[str, Any]:
        origin = Origin(self.model, self.program.args, self.program.kwargs)
        sites = [site for factor in read_guide(self.guide, origin) for site in factor.sites]
        return {**self.run, "shapes of sites": {site.name: tuple(site.shape) for site in sites}}


def _read(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        known = content["format"] == _FORMAT
    except Exception as error:
        msg = (
            f"{path} could not be read as a checkpoint ({type(error).__name__}: {error}). Expected "
            "a file that prune(checkpoint=...) wrote; give another path, or remove the file"
        )
        raise ValueError(msg) from error
    if not known:
        msg = (
            f"{path} has the format {content['format']}. Expected {_FORMAT}: resume it with the "
            "version of pyro-bmr that wrote it, or give another path"
        )
        raise ValueError(msg)
    before = content["run"]
    differences = [
        f"{name} was {before.get(name)!r} and is {run.get(name)!r}"
        for name in sorted(before.keys() | run.keys())
        if before.get(name) != run.get(name)
    ]
    if differences:
        msg = (
            f"{path} is of another run: {'; '.join(differences)}. Expected the same model, guide, "
            "data and options as before; give another path to start anew"
        )
        raise ValueError(msg)
    generators = content["random"]
    torch.set_rng_state(generators.pop("cpu"))
    for device, state in generators.items():
        torch.cuda.set_rng_state(state, device)
    return content["state"]


def _generators() -> dict[str, Tensor]:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return generators


def _pack(state: State) -> dict[str, Any]:
    reduction = state.reduction
    decision = cast(Decision, reduction.decision)
    kept = {name: one for factor in decision.factors for name, one in factor.kept().items()}
    return {
        "parent": {"masks": kept, "tensors": _tensors(state.parent)},
        "masks": dict(decision.masks),
        "shared": dict(decision.shared),
        "order": decision.order,
        "predicted": dict(decision.predicted),
        "scores": dict(reduction.scores),
        "sites": [asdict(site) for site in reduction.sites],
        "layers": [asdict(layer) for layer in reduction.layers],
        "naive_delta_f": reduction.naive_delta_f,
        "realised": reduction.realised,
        "realised_error": reduction.realised_error,
        "notes": list(reduction.notes),
        "guide": _tensors(reduction.guide),
        "rounds": [asdict(r) for r in state.rounds],
        "draws": state.draws,
        "values": dict(state.values),
    }


def _unpack(saved: Mapping[str, Any], guide: Any, reduce: Callable[..., Reduction]) -> State:
    like = next(iter(_tensors(guide).values()), torch.zeros(()))

    def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(like.device) for name, tensor in tensors.items()}

    rounds = tuple(Round(**row) for row in saved["rounds"])
    parent, before = guide, saved["parent"]
    if len(rounds) > 1:
        masks = there(before["masks"])
        parent = reduce(guide, select=lambda scores: {n: masks[n] for n in scores.kept}).guide
        _load_tensors(parent, before["tensors"])
    masks_now = there(saved["masks"])
    reduction = reduce(parent, select=lambda _: masks_now)
    _load_tensors(reduction.guide, saved["guide"])
    decision = replace(
        cast(Decision, reduction.decision),
        order=saved["order"],
        shared=there(saved["shared"]),
        predicted=saved["predicted"],
    )
    reduction = replace(
        reduction,
        scores=there(saved["scores"]),
        sites=tuple(SiteSummary(**row) for row in saved["sites"]),
        layers=tuple(LayerSummary(**row) for row in saved["layers"]),
        naive_delta_f=saved["naive_delta_f"],
        realised=saved["realised"],
        realised_error=saved["realised_error"],
        notes=tuple(saved["notes"]),
        decision=decision,
    )
    return State(reduction, parent, rounds, saved["draws"], saved["values"])


def _tensors(guide: Any) -> dict[str, Tensor]:
    return dict(guide.state_dict()) if isinstance(guide, nn.Module) else {}


def _load_tensors(guide: Any, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(guide, nn.Module):
        guide.load_state_dict(dict(tensors))
