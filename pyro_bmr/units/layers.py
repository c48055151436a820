"""From labels to the units of a model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from pyro_bmr.display import warn
from pyro_bmr.units.components import Components
from pyro_bmr.units.labelled import FIXED, Ints, Labelled
from pyro_bmr.units.labels import Labels
from pyro_bmr.units.producers_and_readers import Axis, Layer, Structure


@dataclass(frozen=True)
class UnitLabelling:
    """The labels of a whole graph.

    ``owners``: by source, the name of its site or tensor and the axis. ``inherited``: by source,
    those in whose prior it is. ``nodes``: by node, every tensor of the graph.
    """

    labels: Labels
    sites: Mapping[str, Labelled]
    tensors: Mapping[str, Labelled]
    inputs: Mapping[str, Labelled]
    owners: list[tuple[str, int]]
    inherited: Mapping[int, set[int]]
    nodes: Mapping[str, Labelled] = field(default_factory=dict)


def write_structure(labelling: UnitLabelling, components: Components) -> Structure:
    """Give units numbers, from 0 in the order of sites; say what produces and what reads them."""
    _warn(labelling, components)
    sites = labelling.sites
    unit_of = np.full(len(components.protected), -1)
    alone = components.sizes == 1
    everywhere = [components.of[axis] for x in sites.values() for axis in x.axes]
    there = np.concatenate([*everywhere, np.zeros(0, np.int64)])
    there = there[~(components.protected | alone)[there]]
    ordered = there[np.sort(np.unique(there, return_index=True)[1])]
    unit_of[ordered] = np.arange(len(ordered))

    def number(axis: Ints) -> Ints:
        return unit_of[components.of[axis]]

    reads = _Reads(labelling)
    axes = {
        name: tuple(
            Axis(torch.from_numpy(number(axis)), reads.of(name, i)) for i, axis in enumerate(x.axes)
        )
        for name, x in (dict(labelling.tensors) | dict(sites)).items()
    }
    protected = {
        name: reason
        for name, x in (dict(sites) | dict(labelling.tensors)).items()
        if (reason := _find_reason(components, x))
    }
    kinds = [
        ("input", [axis for x in labelling.inputs.values() for axis in x.axes]),
        ("input", labelling.labels.data),
        ("input", labelling.labels.merged_inputs),
        ("head", labelling.labels.heads),
        ("channel", labelling.labels.channels),
    ]
    marked = [(kind, _collect(number(axis) for axis in found)) for kind, found in kinds]
    ordered_sites = sorted(sites, key=reads.only_in_priors)
    layers = _find_layers({name: axes[name] for name in ordered_sites}, marked)
    return Structure(
        {name: axes[name] for name in sites},
        {name: axes[name] for name in labelling.tensors},
        layers,
        protected,
        nodes={
            name: tuple(torch.from_numpy(number(axis)) for axis in x.axes)
            for name, x in labelling.nodes.items()
        },
        merged_inputs=torch.tensor(
            sorted(_collect(map(number, labelling.labels.merged_inputs))),
            dtype=torch.long,
            device="cpu",
        ),
    )


class _Reads:
    """Which axes of sites and tensors the network sums over."""

    def __init__(self, labelling: UnitLabelling) -> None:
        self.labelling = labelling
        self.sources = {owner: source for source, owner in enumerate(labelling.owners)}

    def of(self, name: str, i: int) -> bool:
        return self._is_read(self.sources[name, i])

    def only_in_priors(self, name: str) -> bool:
        labels, inherited = self.labelling.labels, self.labelling.inherited
        own = {s for (owner, _), s in self.sources.items() if owner == name}
        return bool(own & inherited.keys()) and not own & (labels.read | labels.produced)

    def _is_read(self, source: int) -> bool:
        labels, inherited = self.labelling.labels, self.labelling.inherited
        if source in labels.produced | labels.read or source not in inherited:
            return source in labels.read - labels.produced
        return all(map(self._is_read, inherited[source] - {source}))


def _find_layers(
    sites: Mapping[str, tuple[Axis, ...]], marked: Iterable[tuple[str, set[int]]]
) -> tuple[Layer, ...]:
    """Put units into layers: those that stand beside each other where they are produced."""
    found: list[tuple[str, list[int]]] = []
    taken: set[int] = set()
    for reads in (False, True):
        groups: list[tuple[list[str], dict[int, None]]] = []
        for name, axis in ((name, axis) for name, axes in sites.items() for axis in axes):
            if axis.reads != reads:
                continue
            units = dict.fromkeys(u for u in axis.units.tolist() if u >= 0 and u not in taken)
            if not units:
                continue
            same = [group for group in groups if units.keys() & group[1].keys()]
            # Axes that share units are of one layer.
            same.append(([name], units))
            if len(same) == 1:
                groups += same
            for other_names, other in same[1:]:
                same[0][0].extend(other_names)
                same[0][1].update(other)
            groups = [group for group in groups if not any(group is s for s in same[1:])]
        found += [(_choose_name(names, sites), list(units)) for names, units in groups]
        taken |= {unit for _, units in groups for unit in units}
    return tuple(
        Layer(name, _find_kind(units, marked), torch.tensor(units, device="cpu"))
        for name, units in found
    )


def _choose_name(names: list[str], sites: Mapping[str, tuple[Axis, ...]]) -> str:
    """Name a layer by its first weight, also where its bias is sampled before, as in attention."""
    return next((name for name in names if len(sites[name]) > 1), names[0])


def _find_kind(units: Iterable[int], marked: Iterable[tuple[str, set[int]]]) -> str:
    own = set(units)
    return next((kind for kind, there in marked if own & there), "unit")


def _collect(found: Iterable[Ints]) -> set[int]:
    return {int(unit) for units in found for unit in np.unique(units)} - {-1}


def _find_reason(components: Components, x: Labelled) -> str:
    return next(filter(None, map(components.find_reason, x.axes)), "")


def _warn(labelling: UnitLabelling, components: Components) -> None:
    """Name operations that have no rule, where sites are protected for them."""
    protections = labelling.labels.protections
    plain = np.zeros(len(components.protected), bool)
    for axis in labelling.labels.outputs:
        plain[components.of[axis]] = True
    plain[components.of[FIXED]] = True
    touched: dict[str, Ints] = {}
    for protection in protections:
        if protection.operation:
            units = components.of[protection.labels]
            before = touched.get(protection.operation, np.zeros(0, np.int64))
            touched[protection.operation] = np.union1d(before, units[~plain[units]])
    for operation, units in touched.items():
        names = [
            name
            for name, x in labelling.sites.items()
            if any(np.isin(components.of[axis], units).any() for axis in x.axes)
        ]
        if names:
            warn(
                f"{operation} has no rule that says which units it keeps apart. Axes of "
                f"{', '.join(names)} that it touches are protected: their units will not be cut"
            )
