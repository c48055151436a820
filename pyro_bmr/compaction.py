"""Smaller models and guides: units that nothing needs are cut out, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import check_switch, read_device
from pyro_bmr.cutting.checking import check_same
from pyro_bmr.cutting.model import cut_model
from pyro_bmr.cutting.planning import (
    LayerCut,
    choose_units,
    indices_left,
    mask_left,
    take_inputs,
)
from pyro_bmr.cutting.program import Cut, Parameter
from pyro_bmr.cutting.rewriting import plan_rewrites
from pyro_bmr.display import Tabular, a_or_an
from pyro_bmr.export.portable import Portable
from pyro_bmr.factors.factor import Factor
from pyro_bmr.graphs.capture import Capture
from pyro_bmr.graphs.few_rows import capture_few_rows, tensors_in
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.moments.no_program import check_program
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.data import convert_data
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.programs.sites import Indices, Site
from pyro_bmr.selection.decision import assemble
from pyro_bmr.units.axes import find_structure
from pyro_bmr.units.influence import find_needed
from pyro_bmr.units.producers_and_readers import Structure

if TYPE_CHECKING:
    import pandas as pd


@alone("compact")
@torch.inference_mode(False)
@torch.no_grad()
def compact(
    model: PrunedModel,
    guide: PrunedGuide,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inputs: bool = False,
) -> Compaction:
    """Cut out the units of a pruned model that can go; see `pyro_bmr.Reduction.compact`.

    The program is the user's own, run on smaller tensors. A ``RuntimeError`` says if it cannot be
    captured, or if masked and compacted model disagree.
    """  # noqa: DOC201
    _check(model, guide)
    check_switch("inputs", inputs)
    origin = guide.origin
    args, keywords = convert_data(origin.model or model, guide, args, kwargs)
    if args or keywords:
        origin = replace(origin, args=args, kwargs=keywords)
    factors = tuple(part.factor() for part in guide.parts)
    sites = [site for factor in factors for site in factor.sites]
    median = {name: value.detach() for name, value in guide.median().items()}
    call, captured = capture_few_rows(origin.model, origin.args, origin.kwargs, median)
    structure = find_structure(captured)
    masks = _find_zeros(model, sites)
    with torch.enable_grad():
        needed = find_needed(captured, [*median.values(), *tensors_in(call)], structure, masks)
    stays, layers = choose_units(structure, needed, masks, sites, inputs=inputs)
    device = next(iter(median.values()), torch.zeros((), device="cpu")).device
    cut = _plan(captured, structure, stays, sites, device)
    labels = {name: structure.nodes[node.name] for name, node in captured.inputs.items()}
    expected = _cut_only(labels, stays)
    read = needed | ~_is_input(structure, needed)
    new_model, new_guide = _assemble(origin, factors, cut, expected, masks)
    calls = call, take_inputs(call, expected)
    check_same(model, new_model, guide, cut.sites, calls)
    return Compaction(
        model=new_model,
        guide=new_guide,
        layers=layers,
        kept=cut.sites,
        inputs=expected,
        used_inputs=_cut_only(labels, read),
        elements=(_elements(factors), _elements(tuple(p.factor() for p in new_guide.parts))),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Compaction(Portable, Tabular):
    """A smaller model and guide that compute what a reduction does.

    Parameters
    ----------
    model : PrunedModel
        The smaller model, under the masks of what is left. Its ``.model`` runs the user's program.
    guide : PrunedGuide
        Its posterior, ready for `pyro.infer.Predictive`, for training and for `reduce`.
    layers : tuple of LayerCut
        One row per layer.
    kept : mapping
        By site that was cut, for each axis the indices that are left, or None for all.
    inputs : mapping
        By argument that the model now expects smaller (``args[0]``), for each axis the indices
        that it wants, or None for all; empty without ``inputs=True``.
    used_inputs : mapping
        By argument of which the model reads only a part, the same for what it reads.
    elements : tuple of int
        How many elements the sites of the guide had, and have.

    Examples
    --------
    >>> print(Compaction(None, None, (LayerCut("w", "unit", 300, 20, {}),), {}, {}, {}, (900, 60)))
    60 of 900 elements left
    ...
    """

    model: PrunedModel
    guide: PrunedGuide
    layers: tuple[LayerCut, ...]
    kept: Mapping[str, Indices]
    inputs: Mapping[str, Indices]
    used_inputs: Mapping[str, Indices]
    elements: tuple[int, int]

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per layer.

        Returns
        -------
        DataFrame
            Indexed by layer; columns ``kind``, ``before``, ``after`` and ``note``.
        """
        import pandas as pd

        rows = [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "before": layer.before,
                "after": layer.after,
                "note": _note(layer),
            }
            for layer in self.layers
        ]
        columns = ["layer", "kind", "before", "after", "note"]
        return pd.DataFrame(rows, columns=columns).set_index("layer")

    def to(self, device: torch.device | str) -> Compaction:
        """Move to a device.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        Compaction
            With its indices there. Model and guide are moved in place, as in torch.
        """

        def moved(by_name: Mapping[str, Indices]) -> dict[str, Indices]:
            return {
                name: tuple(None if index is None else index.to(device) for index in indices)
                for name, indices in by_name.items()
            }

        device = read_device(device)
        return replace(
            self,
            model=self.model.to(device),
            guide=self.guide.to(device),
            kept=moved(self.kept),
            inputs=moved(self.inputs),
            used_inputs=moved(self.used_inputs),
        )

    def take_inputs(
        self, *args: Any, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leave out of arguments of the full model what the compacted one does not expect.

        Parameters
        ----------
        *args
            Of the full model.
        kwargs : mapping, optional
            Keyword arguments of the full model.

        Returns
        -------
        args : tuple
            Of the compacted one.
        kwargs : dict
            The same.
        """
        return take_inputs(convert_data(None, self.guide, args, kwargs), self.inputs)

    def _plan(self) -> dict[str, Any]:
        return {
            "kind": "compaction",
            "layers": [asdict(layer) for layer in self.layers],
            "kept": self.kept,
            "inputs": self.inputs,
            "used_inputs": self.used_inputs,
            "elements": self.elements,
        }

    def __rich__(self) -> Table:
        table = Table(title=self._title, title_justify="left")
        table.add_column("layer")
        table.add_column("kind")
        for column in ("before", "after"):
            table.add_column(column, justify="right")
        table.add_column("note")
        for layer in self.layers:
            table.add_row(
                layer.name, layer.kind, f"{layer.before:,}", f"{layer.after:,}", _note(layer)
            )
        return table

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {self._title: self.summary()}

    @property
    def _title(self) -> str:
        before, after = self.elements
        return f"{after:,} of {before:,} elements left"


def _check(model: Any, guide: Any) -> None:
    check_program(model)
    if not isinstance(model, PrunedModel) or not isinstance(guide, PrunedGuide):
        msg = (
            f"got {a_or_an(model)} and {a_or_an(guide)}. Expected the model and "
            "the guide of a reduction: result.compact(), or compact(result.model, result.guide)"
        )
        raise TypeError(msg)


def _find_zeros(model: PrunedModel, sites: list[Site]) -> dict[str, Tensor]:
    """By site, False where it is zero: where it is pruned, unless its center is elsewhere."""
    masks = {name: mask.cpu() for name, mask in model.masks.by_site().items()}
    for site in sites:
        if site.name in masks:
            masks[site.name] = masks[site.name] | ~site.zero_at_center().cpu()
    return masks


def _cut_only(labels: Mapping[str, tuple[Tensor, ...]], stays: Tensor) -> dict[str, Indices]:
    left = {name: indices_left(axes, stays) for name, axes in labels.items()}
    return {n: kept for n, kept in left.items() if any(index is not None for index in kept)}


def _is_input(structure: Structure, needed: Tensor) -> Tensor:
    found = torch.zeros_like(needed)
    for layer in structure.layers:
        found[layer.units] = layer.kind == "input"
    return found


def _plan(
    captured: Capture,
    structure: Structure,
    stays: Tensor,
    sites: list[Site],
    device: torch.device,
) -> Cut:
    shapes, kept, plates = {}, {}, {}
    for site in sites:
        axes = tuple(axis.units for axis in structure.sites.get(site.name, ()))
        indices = indices_left(axes, stays, device)
        if not any(index is not None for index in indices):
            continue
        shapes[site.name], kept[site.name] = site.shape, indices
        for frame in site.plates:
            dim = None if frame.dim is None else frame.dim - site.event_dim
            if dim is not None and -dim <= len(indices) and indices[dim] is not None:
                plates[frame.name] = indices[dim]
    tensors = []
    for name, own_axes in structure.tensors.items():
        indices = indices_left(tuple(axis.units for axis in own_axes), stays)
        if any(index is not None for index in indices):
            tensors.append((captured.originals[name], indices))
    cut = {id(tensor) for tensor, _ in tensors}
    parameters = tuple(
        Parameter(name, value, constraint)
        for name, (value, constraint) in captured.parameters.items()
        if id(value) in cut
    )
    nodes = structure.nodes
    rewrites = plan_rewrites(
        captured.sized, lambda node: mask_left(nodes.get(node.name, ()), stays)
    )
    return Cut(shapes, kept, plates, tuple(tensors), parameters, rewrites)


def _assemble(
    origin: Origin,
    factors: tuple[Factor, ...],
    cut: Cut,
    inputs: Mapping[str, Indices],
    masked: Collection[str],
) -> tuple[PrunedModel, PrunedGuide]:
    full: Any = origin.model
    args, kwargs = take_inputs((origin.args, dict(origin.kwargs)), inputs)
    create = origin.create_plates
    if create is not None and cut.plates:
        create = partial(_without, frozenset(cut.plates), create)
    smaller = tuple(factor.take(cut.sites) for factor in factors)
    compacted = cut_model(full, cut)
    new = replace(origin, model=compacted, args=args, kwargs=kwargs, create_plates=create)
    model, guide, _ = assemble(new, smaller, {}, masked)
    return model, guide


def _without(names: frozenset[str], create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make the plates of a guide, but for those that are cut."""
    plates = create(*args, **kwargs)
    plates = [plates] if isinstance(plates, pyro.plate) else plates
    return [plate for plate in plates if plate.name not in names]


def _elements(factors: tuple[Factor, ...]) -> int:
    return sum(site.shape.numel() for factor in factors for site in factor.sites)


def _note(layer: LayerCut) -> str:
    return "; ".join(f"{count:,} {note}" for note, count in layer.notes.items())
