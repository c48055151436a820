"""Keeping a training under way, so that a killed one can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.files.structure import Check, count, entries, mapping, number, sequence, tensor
from pyro_bmr.programs.dry_run import find_modules
from pyro_bmr.programs.overwriting import overwrite
from pyro_bmr.training.checkpoint_files import usable_content
from pyro_bmr.training.generators import GENERATORS, pack_generators, set_generators
from pyro_bmr.training.saved_parameters import PARAMETERS
from pyro_bmr.training.steps import Steps

# Of the time that a training takes, writing takes no more than this part ...
_MOST_WRITING = 0.01
# ... and it is not done more often than so, in seconds.
_LEAST_APART = 1.0


@dataclass(eq=False)
class Keeper:
    """What a training goes on from, and where it writes that down after epochs.

    ``saved`` is what `keep` wrote in the process before, None for a training from the start;
    ``write`` puts it into a file; ``undo`` follows if what was saved cannot be used. A loader may
    have ``generators`` of its own.
    """

    saved: Mapping[str, Any] | None = None
    write: Callable[[Mapping[str, Any]], None] | None = None
    undo: Callable[[], None] = lambda: None
    generators: Sequence[torch.Generator] = ()
    _due: float = field(default_factory=lambda: time.monotonic() + _LEAST_APART)

    @property
    def losses(self) -> list[float]:
        """The mean losses of the epochs that are done."""
        return [] if self.saved is None else list(self.saved["losses"])

    def go_on(
        self, steps: Steps, parameters: Mapping[str, Tensor], programs: Collection[Any]
    ) -> None:
        """Put steps, the buffers of programs and the generators where they were."""
        if self.saved is None:
            return
        try:
            with usable_content():
                steps.go_on_from(self.saved["steps"], parameters)
                _set_buffers(self.saved["buffers"], _buffers(programs))
                set_generators(self.saved["random"], _devices(parameters), self.generators)
        except BaseException:
            self.undo()
            raise
        self.saved = None

    def keep(
        self,
        losses: list[float],
        steps: Steps,
        parameters: Mapping[str, Tensor],
        programs: Collection[Any],
        *,
        last: bool = False,
    ) -> None:
        """Write down where a training is after an epoch, if that is due or it is the last one."""
        if self.write is None or not (last or time.monotonic() >= self._due):
            return
        begin = time.monotonic()
        self.write(
            {
                "losses": losses,
                "steps": steps.pack(),
                "buffers": _buffers(programs),
                "random": pack_generators(_devices(parameters), self.generators),
            }
        )
        end = time.monotonic()
        self._due = end + max(_LEAST_APART, (end - begin) / _MOST_WRITING)


def _devices(parameters: Mapping[str, Tensor]) -> set[torch.device]:
    return {parameter.device for parameter in parameters.values()}


def _buffers(programs: Collection[Any]) -> dict[str, Tensor]:
    modules = [module for program in programs for module in find_modules(program)]
    return {
        f"{i} {name}": buffer
        for i, module in enumerate(modules)
        for name, buffer in module.named_buffers()
    }


def _set_buffers(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    described = [
        {name: f"{t.dtype} {tuple(t.shape)}" for name, t in one.items()} for one in (saved, own)
    ]
    if described[0] != described[1]:
        msg = (
            f"the checkpoint is of another run: its buffers are {described[0]}, and those of model "
            f"and guide are {described[1]}. Expected the same; give another path to start anew"
        )
        raise ValueError(msg)
    for name, buffer in own.items():
        overwrite(buffer, saved[name])


_STEPS = entries({"parameters": PARAMETERS, "steps_done": count, "noise": sequence(tensor)})
TRAINING: Check = entries(
    {
        "losses": sequence(number),
        "steps": _STEPS,
        "buffers": mapping(tensor),
        "random": GENERATORS,
    }
)
