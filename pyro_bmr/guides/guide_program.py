"""The user's own guides, run for the sites that a reduction leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.programs.given_values import ValueMessenger

Plates = Mapping[str, Any]


@dataclass(frozen=True)
class GuideProgram:
    """Guides that are run as they are, and the ``sites`` that they draw.

    ``whole`` is the `pyro.infer.autoguide.AutoGuideList` that they are parts of, if they are.
    """

    guides: tuple[Callable[..., Any], ...]
    sites: frozenset[str] = frozenset()
    whole: Any = None

    def run(
        self, given: Mapping[str, Tensor], plates: Plates, args: Any, kwargs: Any
    ) -> dict[str, Tensor]:
        """Run all, with what is ``given`` at its value and out of sight; return what they draw."""
        with (
            _plates_of(self.whole, plates),
            poutine.block(hide=list(given)),
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
        with _plates_of(self.whole, plates):
            for guide in self.guides:
                if isinstance(guide, AutoGuide):
                    found |= guide.median(*args, **kwargs)
        return found


def leave(factors: Iterable[Factor], program: GuideProgram | None) -> Iterator[Factor]:
    """Leave to a program all that it draws and that has no prior, so is not reduced."""
    for factor in factors:
        names = {site.name for site in factor.sites}
        if program is None or factor.priors or not names <= program.sites:
            yield factor
            continue
        locations = factor.locations()
        for site in factor.sites:
            yield ProgramFactor(site, locations[site.name][None], factor.obstacle)


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
