"""The user's own guides, run for the sites that are not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import ValueMessenger

Plates = Mapping[str, Any]


@dataclass(frozen=True)
class GuideProgram:
    """Guides that are run as they are, for the ``sites`` that are not read of them.

    ``whole`` is the `pyro.infer.autoguide.AutoGuideList` that they are parts of, if they are.
    ``hidden`` are auxiliary statements of sites that are read.
    """

    guides: tuple[Callable[..., Any], ...]
    sites: frozenset[str] = frozenset()
    whole: Any = None
    hidden: frozenset[str] = frozenset()

    def run(
        self, given: Mapping[str, Tensor], plates: Plates, args: Any, kwargs: Any
    ) -> dict[str, Tensor]:
        """Run all, with what is ``given`` at its value and out of sight; return what they draw."""
        # A plate that was made already takes the same rows, and is not in a trace twice.
        given = {**given, **{name: plate.indices for name, plate in plates.items()}}
        with (
            _plates_of(self.whole, plates),
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

    def parameters(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Return the parameters that a run uses."""
        with dry_run(*self.guides), poutine.block(), poutine.trace(param_only=True) as traced:
            self.run({}, {}, args, kwargs)
        return {name: node["value"].detach() for name, node in traced.trace.nodes.items()}

    def median(self, plates: Plates, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Return the medians of those that tell them."""
        found: dict[str, Tensor] = {}
        with _plates_of(self.whole, plates):
            for guide in self.guides:
                if isinstance(guide, AutoGuide):
                    with suppress(NotImplementedError):  # flows, and guides of discrete sites
                        found |= guide.median(*args, **kwargs)
        return found


@contextmanager
def _plates_of(whole: Any, plates: Plates) -> Iterator[None]:
    """Lend a list of autoguides its plates, which its parts look up while they run."""
    if whole is None:
        yield
        return
    own = {
        name: pyro.plate(name, f.full_size or f.size, dim=f.dim, subsample_size=f.size)
        for name, f in sorted(whole._prototype_frames.items())
        if name not in plates
    }
    before = getattr(whole, "plates", {})
    whole.plates = {**own, **plates}
    try:
        yield
    finally:
        whole.plates = before
