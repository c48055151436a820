"""Groups of the elements of all reducible sites: made of labels, or of the units of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmr.mathematics.membership import Membership
from pyro_bmr.selection.groups import Grouping, Labelling, UnitGrouping, read_labels
from pyro_bmr.units.producers_and_readers import Axis, Layer, Structure


def form_groups(
    grouping: Grouping, shapes: Mapping[str, torch.Size], find_structure: Callable[[], Structure]
) -> Groups | None:
    """Form the groups of a grouping; None if every element stands for itself."""
    if isinstance(grouping, UnitGrouping):
        return _group_units(grouping, shapes, find_structure())
    return _group_by_labels(grouping, shapes)


@dataclass(frozen=True)
class GroupLayer:
    """Groups beside each other: ``count`` of all groups, from ``start`` on.

    Selections know it by ``name``. ``kind`` is that of a layer of the model, ``"group"`` for labels
    of a user, or ``"element"`` for elements of a site of which each stands for itself. ``held``
    says that units can be zero, but not be cut out.
    """

    name: str
    kind: str
    start: int
    count: int
    at_least: int = 0
    round_to: int = 1
    held: bool = False

    @property
    def slice(self) -> slice:
        """Where its groups are among all."""
        return slice(self.start, self.start + self.count)

    def must_keep(self, kept: int) -> int:
        """Return how many groups have to stay, no fewer, if a selection keeps so many."""
        wanted = max(kept, self.at_least)
        return min(self.count, -(-wanted // self.round_to) * self.round_to)


@dataclass(frozen=True)
class Groups:
    """Groups of elements, in layers; elements count through all reducible sites.

    ``producers`` are the members that produce a unit which nothing needs once its others are zero.
    """

    layers: tuple[GroupLayer, ...]
    members: Membership
    producers: Membership


def _group_by_labels(labelling: Labelling, shapes: Mapping[str, torch.Size]) -> Groups | None:
    labels = {name: read_labels(labelling, name, shape) for name, shape in shapes.items()}
    given = [one.reshape(-1).cpu() for one in labels.values() if one is not None]
    if not given:
        return None
    # A site whose elements stand for themselves has labels above all others.
    start = 1 + max([-1, *(int(one.max()) for one in given if len(one))])
    flat, site = [], []
    for i, (name, shape) in enumerate(shapes.items()):
        own = labels[name]
        if own is None:
            own = torch.arange(shape.numel(), device="cpu") + start
            start += shape.numel()
        flat.append(own.reshape(-1).cpu())
        site.append(torch.full_like(flat[-1], i))
    label = torch.cat(flat)
    element = (label >= 0).nonzero()[:, 0]
    group = label[element].unique(return_inverse=True)[1]
    count = int(group.max()) + 1 if len(group) else 0
    # A group belongs to the layer of the first site that it is in, and layers come site by site.
    first = torch.full((count,), len(shapes), device="cpu")
    first.scatter_reduce_(0, group, torch.cat(site)[element], "amin")
    layers, at = [], 0
    for i, (name, own) in enumerate(labels.items()):
        size = int((first == i).sum())
        if size:
            layers.append(GroupLayer(name, "element" if own is None else "group", at, size))
        at += size
    rank = first.argsort(stable=True).argsort()
    members = _membership(rank[group], element, count, len(label))
    return Groups(tuple(layers), members, _membership(group[:0], group[:0], count, len(label)))


def _group_units(
    grouping: UnitGrouping, shapes: Mapping[str, torch.Size], structure: Structure
) -> Groups:
    ignored = _ignored_layers(grouping.ignore, structure)
    chosen = [x for x in structure.layers if x.kind in grouping.kinds and x.name not in ignored]
    labels = torch.cat(
        [torch.zeros(0, dtype=torch.long, device="cpu"), *(x.units.cpu() for x in chosen)]
    )
    # By label, its place among the units of these layers; -1 for all others, and for -1 itself.
    place = torch.full((_count_labels(structure) + 1,), -1, device="cpu")
    place[labels] = torch.arange(len(labels), device="cpu")
    group, element, reads, start = [labels[:0]], [labels[:0]], [labels[:0].bool()], 0
    for name, shape in shapes.items():
        for unit, axis in _members(name, shape, structure, place):
            mine = (unit >= 0).reshape(-1).nonzero()[:, 0]
            group.append(unit.reshape(-1)[mine])
            element.append(mine + start)
            reads.append(torch.full_like(mine, axis.reads, dtype=torch.bool))
        start += shape.numel()
    unit_of = torch.cat(group)
    present = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    present[unit_of] = True
    layers: list[GroupLayer] = []
    at, first = 0, 0
    for layer in chosen:
        count = int(present[first : first + len(layer.units)].sum())
        first += len(layer.units)
        if count:
            name = _unused(layer, {other.name for other in layers})
            held = bool(torch.isin(layer.units, structure.held).any())
            options = grouping.at_least, grouping.round_to, held
            layers.append(GroupLayer(name, layer.kind, at, count, *options))
        at += count
    rank = present.cumsum(0) - 1
    members = _membership(rank[unit_of], torch.cat(element), at, start)
    released = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    if structure.released is not None:
        released = structure.released.cpu()[labels]
    produces = ~torch.cat(reads) & released[unit_of]
    producers = _membership(rank[unit_of[produces]], torch.cat(element)[produces], at, start)
    return Groups(tuple(layers), members, producers)


def _members(
    name: str, shape: torch.Size, structure: Structure, place: Tensor
) -> Iterator[tuple[Tensor, Axis]]:
    """For each axis of a site, the unit that each element belongs to through it; -1 for none."""
    axes = structure.sites.get(name, ())
    sizes = tuple(len(axis.units) for axis in axes)
    if axes and sizes != tuple(shape):
        msg = (
            f"the site {name!r} has the shape {sizes} in the model and {tuple(shape)} in the "
            "guide. Expected one shape; with subsampled plates, pass data of the full size"
        )
        raise ValueError(msg)
    for i, axis in enumerate(axes):
        unit = place[axis.units.cpu()]
        if (unit >= 0).any():
            yield unit.reshape(-1, *[1] * (len(shape) - i - 1)).expand(shape), axis


def _ignored_layers(ignore: Collection[str], structure: Structure) -> set[str]:
    produced = {
        name: {int(u) for axis in axes if not axis.reads for u in axis.units.unique() if u >= 0}
        for name, axes in structure.sites.items()
        if name in ignore
    }
    ignored: set[str] = set()
    for name in ignore:
        layers = {
            layer.name
            for layer in structure.layers
            if layer.name == name or produced.get(name, set()) & set(layer.units.tolist())
        }
        if not layers:
            listed = ", ".join(f"{x.name} ({len(x.units)} {x.kind}s)" for x in structure.layers)
            msg = (
                f"got ignore={sorted(ignore)}, and {name!r} is no layer and produces none. "
                f"Expected names of layers, or of sites that produce them: {listed or 'none'}"
            )
            raise ValueError(msg)
        ignored |= layers
    return ignored


def _count_labels(structure: Structure) -> int:
    tensors = [axis.units for axes in structure.sites.values() for axis in axes]
    tensors += [layer.units for layer in structure.layers]
    return 1 + max((int(t.max()) for t in tensors if t.numel()), default=-1)


def _unused(layer: Layer, taken: Collection[str]) -> str:
    names = [layer.name, f"{layer.name} ({layer.kind}s)"]
    names += [f"{layer.name} ({i})" for i in range(2, len(taken) + 3)]
    return next(name for name in names if name not in taken)


def _membership(group: Tensor, element: Tensor, num_groups: int, num_elements: int) -> Membership:
    """Put pairs in order; the diagonal of a square weight may belong to one unit twice."""
    pairs = (group * num_elements + element).unique()
    group = pairs.div(max(num_elements, 1), rounding_mode="floor")
    return Membership(group, pairs - group * num_elements, num_groups, num_elements)
