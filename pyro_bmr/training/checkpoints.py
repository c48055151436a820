"""Checkpoints of `prune`: what it needs to go on, in the middle of a training too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_bmr.files.structure import (
    Check,
    booleans,
    check_shape,
    count,
    entries,
    floats,
    mapping,
    number,
    optional,
    record,
    refuse,
    sequence,
    tensor,
    text,
)
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide
from pyro_bmr.programs.dry_run import find_tensors
from pyro_bmr.programs.overwriting import overwrite
from pyro_bmr.programs.undoing import remember
from pyro_bmr.results import Reduction
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary
from pyro_bmr.training.checkpoint_files import CheckpointFile, usable_content
from pyro_bmr.training.generators import GENERATORS, pack_generators, set_generators
from pyro_bmr.training.keeping import TRAINING, Keeper
from pyro_bmr.training.states import Program, State


@dataclass(eq=False)
class Checkpoint:
    """The file of a run of `prune`, which ``run`` tells from others; no file without ``path``.

    Of many ranks the first one writes it, and all go on from it.

    It holds the last whole state, and the training that goes on from there.
    """

    path: Path | None
    run: Mapping[str, Any]
    guide: Any
    program: Program
    model: Callable[..., Any]
    _state: Mapping[str, Any] | None = field(default=None, init=False)
    _training: Mapping[str, Any] | None = field(default=None, init=False)
    _undo: Callable[[], None] = field(default=lambda: None, init=False)

    def load(self, reduce: Callable[..., Reduction]) -> tuple[State, int] | None:
        """Go back to the last whole state; return it, and how many selections were ahead.

        None if there is none. ``reduce`` takes a guide and a selection. Sets the guide, the model
        and the random number generators as they were. A file that is damaged, not a checkpoint, or
        one of another run, raises a ValueError and changes nothing.
        """
        saved, ranks = None, self.program.ranks
        with ranks.together():
            if self._file is not None and ranks.is_first:
                saved = self._file.read(_CONTENT)
        content = ranks.give(None if saved is None else saved.content)
        if content is None:
            return None
        self._undo = remember(self.guide, self.program.model)
        try:
            with ranks.together():
                self.program.call(self.guide)
                if saved is not None:
                    saved.check_run(self._full_run)
            self._state, self._training = content["state"], content["training"]
            return None if self._state is None else self._go_back(self._state, reduce)
        except BaseException:
            self._undo()
            raise

    def _go_back(
        self, state: Mapping[str, Any], reduce: Callable[..., Reduction]
    ) -> tuple[State, int]:
        with usable_content():
            _load(self._tensors(), state["guide"])
            last = _unpack(state["last"], self.guide, reduce)
            _load(self.program.find_shared(last.reduction.guide), last.values)
            set_generators(state["random"], self._devices(), self.program.generators)
        return last, state["ahead"]

    def write(self, last: State, ahead: int) -> None:
        """Write a whole state, and how many selections are ahead."""
        if self._writes:
            self._state = {
                "last": _pack(last),
                "ahead": ahead,
                # What of it is run in later rounds, as it is, is trained in these.
                "guide": {name: t.detach().clone() for name, t in self._tensors().items()},
                "random": pack_generators(self._devices(), self.program.generators),
            }
            self._write(None)

    def keeper(self) -> Keeper | None:
        """Return what keeps the next training; None without a file."""
        if self._file is None:
            return None
        write = self._write if self._writes else None
        keeper = Keeper(self._training, write, self._undo, self.program.generators)
        self._training, self._undo = None, lambda: None
        return keeper

    def _write(self, training: Mapping[str, Any] | None) -> None:
        content = {"state": self._state, "training": training}
        cast(CheckpointFile, self._file).write(self._full_run, content)

    @property
    def _writes(self) -> bool:
        return self._file is not None and self.program.ranks.is_first

    @property
    def _file(self) -> CheckpointFile | None:
        return None if self.path is None else CheckpointFile(self.path, "prune")

    @cached_property
    def _full_run(self) -> dict[str, Any]:
        origin = Origin(self.model, self.program.args, self.program.kwargs)
        sites = [site for factor in read_guide(self.guide, origin) for site in factor.sites]
        return {**self.run, "shapes of sites": {site.name: list(site.shape) for site in sites}}

    def _devices(self) -> set[torch.device]:
        return {tensor.device for tensor in self._tensors().values()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the user's guide, of entries of the param store too."""
        run = partial(self.guide, *self.program.args, **self.program.kwargs)
        own = _tensors(self.guide)
        held = set(map(id, own.values()))
        used = find_tensors(run, [self.guide])
        return own | {name: tensor for name, tensor in used.items() if id(tensor) not in held}


def _tensors(guide: Any) -> dict[str, Tensor]:
    return dict(guide.state_dict(keep_vars=True)) if isinstance(guide, nn.Module) else {}


@torch.no_grad()
def _load(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Set the tensors of a program; a ValueError says if they are not its own, or not finite."""
    described = [{n: f"{t.dtype} {tuple(t.shape)}" for n, t in one.items()} for one in (saved, own)]
    if described[0] != described[1]:
        msg = (
            f"the checkpoint has the tensors {described[0]}, and the program {described[1]}. "
            "Expected the model and guide that were pruned; give another path to start anew"
        )
        raise ValueError(msg)
    for name, value in own.items():
        if value.requires_grad and not saved[name].isfinite().all():
            msg = (
                f"the checkpoint has values of {name} that are not finite. Expected those of a run "
                "that was not; remove the file, or give another path"
            )
            raise ValueError(msg)
        overwrite(value, saved[name])


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
    like = next(iter(_tensors(guide).values()), torch.zeros((), device="cpu"))

    def there(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(like.device) for name, tensor in tensors.items()}

    rounds = tuple(Round(**row) for row in saved["rounds"])
    parent, before = guide, saved["parent"]
    if sum(one.counts for one in rounds) > 1:
        masks = there(before["masks"])
        parent = reduce(guide, select=lambda scores: {n: masks[n] for n in scores.kept}).guide
        _load(_tensors(parent), before["tensors"])
    masks_now = there(saved["masks"])
    reduction = reduce(parent, select=lambda _: masks_now)
    _load(_tensors(reduction.guide), saved["guide"])
    decision = replace(
        cast(Decision, reduction.decision),
        order=tuple(saved["order"]),
        shared=there(saved["shared"]),
        predicted=saved["predicted"],
    )
    reduction = replace(
        reduction,
        scores=there(saved["scores"]),
        sites=tuple(SiteSummary(**{**r, "shape": tuple(r["shape"])}) for r in saved["sites"]),
        layers=tuple(LayerSummary(**row) for row in saved["layers"]),
        naive_delta_f=saved["naive_delta_f"],
        realised=saved["realised"],
        realised_error=saved["realised_error"],
        notes=tuple(saved["notes"]),
        decision=decision,
    )
    draws = saved["draws"].cpu()
    return State(reduction, parent, rounds, draws, saved["values"])


_TENSORS = mapping(tensor)
_LAST = entries(
    {
        "parent": entries({"masks": mapping(booleans), "tensors": _TENSORS}),
        "masks": mapping(booleans),
        "shared": _TENSORS,
        "order": sequence(text),
        "predicted": mapping(number),
        "scores": mapping(floats),
        "sites": sequence(record(SiteSummary)),
        "layers": sequence(record(LayerSummary)),
        "naive_delta_f": optional(number),
        "realised": optional(number),
        "realised_error": optional(number),
        "notes": sequence(text),
        "guide": _TENSORS,
        "rounds": sequence(record(Round)),
        "draws": floats,
        "values": _TENSORS,
    }
)


def _check_last(value: Any, where: str) -> None:
    _LAST(value, where)
    if not any(one.get("counts", True) for one in value["rounds"]):
        raise refuse(value["rounds"], f"{where}/rounds", "one that counts")
    draws = value["draws"]
    if draws.dim() != 1 or len(draws) < 2:
        raise refuse(draws, f"{where}/draws", "two free energies or more")
    for name, scores in value["scores"].items():
        check_shape(scores, value["masks"].get(name, scores).shape, f"{where}/scores/{name}")


_STATE = entries({"last": _check_last, "ahead": count, "guide": _TENSORS, "random": GENERATORS})
_CONTENT: Check = entries({"state": optional(_STATE), "training": optional(TRAINING)})
