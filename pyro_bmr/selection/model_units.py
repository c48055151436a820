"""The units of a model that is to be reduced, read when they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from pyro_bmr.factors.centering import value_locations
from pyro_bmr.factors.vanishing import vanishes
from pyro_bmr.graphs.capture import Capture
from pyro_bmr.graphs.few_rows import capture_few_rows, tensors_in
from pyro_bmr.moments.no_program import NoProgram, check_program
from pyro_bmr.selection.problem import Problem
from pyro_bmr.units.axes import find_structure
from pyro_bmr.units.influence import find_needed, find_released
from pyro_bmr.units.producers_and_readers import Structure


def read_units(problem: Problem) -> ModelUnits:
    """Find the units of the model, which runs at the posterior's location."""
    values = {
        site.name: replace(site, center=None).constrain(value_locations(factor)[site.name])
        for factor in problem.factors
        for site in factor.sites
    }
    origin = problem.origin
    if origin.moments is not None:
        check_program(NoProgram())
    call, captured = capture_few_rows(origin.model, origin.args, origin.kwargs, values)
    tensors = (*values.values(), *tensors_in(call))
    return ModelUnits(captured, tensors, find_structure(captured))


@dataclass(frozen=True)
class ModelUnits:
    """The graph of a model, the values of its sites and inputs, and its units."""

    capture: Capture
    inputs: tuple[Tensor, ...]
    structure: Structure

    def find_needed(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Tell, by label, which units cannot go where sites are zero wherever a mask is False."""
        with torch.enable_grad():
            return find_needed(self.capture, self.inputs, self.structure, masks)

    def with_released(self, sites: Collection[str]) -> Structure:
        """Add which units nothing needs once what reads them, in ``sites``, is zero."""
        with torch.enable_grad():
            released = find_released(self.capture, self.inputs, self.structure, sites)
        return replace(self.structure, released=released)


class UnitsOnDemand:
    """The units of a model, read when they are first asked for.

    Where they are only looked for, ``notes`` say why they could not be read.
    """

    def __init__(self, problem: Problem, spiked: Collection[str]) -> None:
        self.zeroed = _find_zeroed(problem, spiked)
        self.notes: tuple[str, ...] = ()
        self._read = cache(partial(read_units, problem))
        self._structure = cache(lambda: self._read().with_released(self.zeroed))

    def structure(self) -> Structure:
        """Return the units that were found, with those that can be released."""
        return self._structure()

    def structure_if_read(self) -> Structure | None:
        """Return the same if it is known by now."""
        return self.structure() if self._read.cache_info().currsize else None

    def if_any(self) -> ModelUnits | None:
        """Look for the units of the model, in silence."""
        try:
            with warnings.catch_warnings(action="ignore"):
                return self._read()
        except (RuntimeError, ValueError) as error:
            told = f"the units of the model are not known, so that none is unread: {error}"
            self.notes = (*self.notes, told)
            return None


def _find_zeroed(problem: Problem, spiked: Collection[str]) -> tuple[str, ...]:
    """Name the spiked sites whose pruned elements are zero."""
    return tuple(
        site.name
        for factor in problem.factors
        for site in factor.sites
        if site.name in spiked
        and (vanishes(problem.priors.get(site.name)) or bool(site.zero_at_center().all()))
    )
