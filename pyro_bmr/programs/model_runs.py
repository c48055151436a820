"""Running a model at given values of its latent sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_bmr.programs.centers import CenterMessenger, add_weighted
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import RowMessenger, ValueMessenger, take_rows
from pyro_bmr.programs.sites import Site


@dataclass(frozen=True)
class ModelRuns:
    """A model, its arguments, and the unconstrained locations of the sites of its guide.

    Runs leave no trace: parameters that they would add to the param store, buffers that they would
    update and random numbers that they would draw are all put back.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    locations: Mapping[str, tuple[Site, Tensor]] = field(default_factory=dict)

    def here(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Run once at the locations, with gradients and provenance.

        Returns the nodes of the trace and, by site, the leaf that gradients lead to. An error of
        the model stays what it is, with a note.
        """
        leaves = {name: loc.detach().requires_grad_() for name, (_, loc) in self.locations.items()}
        try:
            return self._tracked(leaves), leaves
        except Exception:
            # The model may write to its samples, which the guide's own tensors do not allow.
            copies = {name: leaf.clone() for name, leaf in leaves.items()}
        try:
            return self._tracked(copies), leaves
        except Exception as error:
            error.add_note(
                "the model could not be run to read its priors. Expected it to run with the "
                "arguments of the guide's first call, or with those given, which take the place of "
                "all of these; pass the arguments of the model, and its keywords as kwargs=, as "
                "when it was trained, on the device of the guide"
            )
            raise

    @contextmanager
    def elsewhere(self) -> Iterator[Callable[..., dict[str, Any]]]:
        """Run with some sites elsewhere, and the same random numbers every time.

        Yields a function from their unconstrained values, and from the rows of plates that choose
        rows by themselves, to the nodes of the trace.
        """

        def run(
            values: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None
        ) -> dict[str, Any]:
            pyro.set_rng_seed(0)
            here = {name: loc.clone() for name, (_, loc) in self.locations.items()}
            with RowMessenger(rows or {}):
                return self._trace(here | dict(values))

        with dry_run(self.model), torch.no_grad():
            yield run

    def at_rows(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Run once at the locations, with given rows of plates that choose rows by themselves."""
        with self.elsewhere() as run:
            return run({}, rows)

    def _tracked(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        with dry_run(self.model), TrackProvenance():
            return self._trace(values)

    def _trace(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        sites = {name: site for name, (site, _) in self.locations.items()}
        centers = {name: site.center for name, site in sites.items() if site.center is not None}
        if any(center.weights for center in centers.values()):
            flat = {name: values[name].reshape(-1) for name in sites}
            added = add_weighted(sites.values(), flat)
            values = {name: own.reshape(values[name].shape) for name, own in added.items()}
        constrained = {name: sites[name].constrain(value) for name, value in values.items()}
        with CenterMessenger(centers), ValueMessenger(constrained, take_rows):
            return dict(poutine.trace(self.model).get_trace(*self.args, **self.kwargs).nodes)


def find_sources(value: Any, leaves: Mapping[str, Tensor]) -> set[str]:
    """Name the sites and parameters that a value in a run of `ModelRuns.here` was computed from.

    Gradients lead also through values that were written in place, provenance also through discrete
    ones.
    """
    found: set[str] = set()
    for tensor in find_tensors(value):
        found |= get_provenance(tensor) | find_gradients(tensor, leaves).keys()
    return found


def find_gradients(tensor: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Differentiate the sum of a tensor in a run of `ModelRuns.here` by what it depends on."""
    plain = detach_provenance(tensor)
    if not (plain.requires_grad and leaves):
        return {}
    with torch.enable_grad():
        total = plain.sum()
    gradients = torch.autograd.grad(
        total, list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors that a distribution was made of, in whatever it wraps."""
    seen, ahead = set(), [value]
    while ahead:
        this = ahead.pop()
        if isinstance(this, Tensor):
            yield this
        elif isinstance(this, list | tuple):
            ahead += this
        elif isinstance(this, Distribution | Transform) and id(this) not in seen:
            seen.add(id(this))
            ahead += vars(this).values()
