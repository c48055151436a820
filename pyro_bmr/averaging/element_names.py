"""Which elements a name is of: a site, an element, or a pattern over the names of both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.arguments.patterns import find_names, refuse_name
from pyro_bmr.moments.names import Layout
from pyro_bmr.moments.posterior import Posterior

# What a name stands for: places in the vector of all elements.
Places = Any


def read_names_of(guide: Any, shapes: Mapping[str, torch.Size]) -> ElementNames:
    """Name the elements of some sites of a guide: by its labels if it is a posterior with some."""
    labels = guide.layout.labels if isinstance(guide, Posterior) else {}
    return ElementNames(Layout(shapes, labels))


@dataclass(frozen=True)
class ElementNames:
    """Names of the elements of some sites, flattened one site after the other."""

    layout: Layout
    _found: dict[str, Places] = field(default_factory=dict, repr=False)

    @cached_property
    def sites(self) -> dict[str, slice]:
        """Where each site is."""
        sizes = [shape.numel() for shape in self.layout.shapes.values()]
        ends = itertools.accumulate(sizes)
        return {
            name: slice(end - size, end)
            for name, size, end in zip(self.layout.shapes, sizes, ends, strict=True)
        }

    @cached_property
    def elements(self) -> dict[str, int]:
        """Where each element is, by a name such as ``w[3,1]``."""
        return {name: i for i, name in enumerate(self.layout.elements())}

    def find(self, place: str, name: str) -> Places:
        """Return where a name is; a name of a site or an element is never taken as a pattern."""
        if name not in self._found:
            self._found[name] = self._find(place, name)
        return self._found[name]

    def locate(self, place: str, name: Any) -> tuple[Places, torch.Size]:
        """Return where a name is, and in which shape: of a site, a part of it, or none.

        Parts of a site without labels are also counted from its end, as in ``w[-1]``, and a row
        may be one, as in ``w[0]``.
        """
        if not isinstance(name, str):
            refuse(place, name, "names of sites or elements")
        if name in self.sites:
            return self.sites[name], self.layout.shapes[name]
        match = re.fullmatch(r"(.+)\[(-?\d+(?:, ?-?\d+)*)\]", name)
        if match is None or match[1] not in self.sites or self.layout.labels.get(match[1]):
            return np.atleast_1d(np.arange(self.layout.size)[self.find(place, name)]), torch.Size(
                []
            )
        shape, part = self.layout.shapes[match[1]], self.sites[match[1]]
        numbers = torch.arange(part.start, part.stop, device="cpu").reshape(shape)
        try:
            where = numbers[tuple(map(int, match[2].split(",")))]
        except IndexError:
            refuse(place, name, f"an element of {match[1]!r} of shape {tuple(shape)}")
        return where.reshape(-1).numpy(), where.shape

    def is_pattern(self, name: str) -> bool:
        """Tell whether a name is of no site and no element."""
        return name not in self.sites and name not in self.elements

    def _find(self, place: str, name: str) -> Places:
        if name in self.sites:
            return self.sites[name]
        if name in self.elements:
            return self.elements[name]
        found = np.zeros(self.layout.size, dtype=bool)
        for site in find_names(name, self.sites):
            found[self.sites[site]] = True
        found[[self.elements[one] for one in find_names(name, self.elements)]] = True
        if not found.any():
            known = dict.fromkeys([*self.sites, *self.elements])
            refuse_name(place, name, known, "a site, an element, or a pattern such as 'A*',")
        return found.nonzero()[0]
