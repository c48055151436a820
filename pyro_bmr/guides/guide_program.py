"""The user's own guides, run for the sites that are not read."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_bmr.guides.copied_guides import Guides, copy_guides, is_copied
from pyro_bmr.programs.dry_run import find_tensors
from pyro_bmr.programs.given_values import ValueMessenger
from pyro_bmr.programs.own_names import OwnNames, unused_name
from pyro_bmr.programs.wrapped import peel

Plates = Mapping[str, Any]


class GuideProgram(OwnNames):
    """Guides that are run as they are, for the ``sites`` that are not read of them.

    Guides that are modules are copied, but for the ``tied`` parameters, those of the model.
    Functions have their parameters in Pyro's param store, under names of their own, and share them
    with the guide that came in. ``hidden`` are auxiliary statements of sites that are read;
    ``frames`` the plates of the `pyro.infer.autoguide.AutoGuideList` that the guides are parts of.
    """

    def __init__(
        self,
        guides: Guides,
        sites: Collection[str] = (),
        hidden: Collection[str] = (),
        frames: Mapping[str, Any] | None = None,
        tied: tuple[Tensor, ...] = (),
        memo: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(unused_name("GuideProgram"))
        self.sites, self.hidden = frozenset(sites), frozenset(hidden)
        self.frames, self.tied = dict(frames or {}), tied
        self.plates: dict[str, Any] = {}
        self.guides = copy_guides(guides, memo, tied)
        for i, (came, guide) in enumerate(zip(guides, self.guides, strict=True)):
            if is_copied(guide):
                module: Any = peel(guide).program
                # PyroModule.add_module refuses a module that has been run.
                torch.nn.Module.add_module(self, str(i), module)
                if getattr(peel(came).program, "master", None) is not None:
                    module._update_master(weakref.ref(self))
        self.rename(self._pyro_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuideProgram:
        """Copy what is not shared."""
        return self.of(self.sites, self.hidden, memo)

    def of(
        self,
        sites: Collection[str],
        hidden: Collection[str],
        memo: dict[int, Any] | None = None,
    ) -> GuideProgram:
        """Copy it, for other sites."""
        return GuideProgram(self.guides, sites, hidden, self.frames, self.tied, memo)

    def run(
        self, given: Mapping[str, Tensor], plates: Plates, args: Any, kwargs: Any
    ) -> dict[str, Tensor]:
        """Run all, with what is ``given`` at its value and out of sight; return what they draw."""
        # A plate that was made already takes the same rows, and is not in a trace twice.
        given = {**given, **{name: plate.indices for name, plate in plates.items()}}
        with (
            self._lend(plates),
            poutine.block(hide=[*given, *self.hidden]),
            ValueMessenger(given),
            poutine.trace() as traced,
        ):
            for guide in self.guides:
                guide(*args, **kwargs)
        return {
            name: node["value"]
            for name, node in prune_subsample_sites(traced.trace).iter_stochastic_nodes()
            if name not in given and not node["infer"].get("is_auxiliary")
        }

    def median(self, plates: Plates, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Return the medians of those that tell them."""
        found: dict[str, Tensor] = {}
        store = pyro.get_param_store()
        # AutoDelta runs itself for its medians, which makes parameters in the store.
        with self._lend(plates), store.scope(store.get_state()):
            for guide in self.guides:
                if isinstance(guide, AutoGuide):
                    with suppress(NotImplementedError):  # flows, and guides of discrete sites
                        found |= guide.median(*args, **kwargs)
        return found

    def find_shared(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Return the tensors, by name, that training changes of what could not be copied."""
        own = {id(tensor) for tensor in (*self.parameters(), *self.buffers())}
        run = partial(self.run, {}, {}, args, kwargs)
        tensors = find_tensors(run, self.guides)
        return {name: tensor for name, tensor in tensors.items() if id(tensor) not in own}

    @contextmanager
    def _lend(self, plates: Plates) -> Iterator[None]:
        """Have the plates of a list of autoguides, which its parts look up while they run."""
        self.plates = {
            name: pyro.plate(name, f.full_size or f.size, dim=f.dim, subsample_size=f.size)
            for name, f in sorted(self.frames.items())
            if name not in plates
        }
        self.plates |= plates
        try:
            yield
        finally:
            self.plates = {}
