"""Named sub-models as masks, and grids of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.arguments.arrays import check_tensor, is_array
from pyro_bmr.arguments.checks import check_kind, refuse, refuse_kind, show
from pyro_bmr.averaging.element_names import ElementNames
from pyro_bmr.selection.scores import ElementScores
from pyro_bmr.selection.stages import checked_masks

SUB_MODEL = (
    "what it keeps, True, and what is off, False, by name, such as {'A(2,1)': False}, "
    "{'*': False, 'A*': True} or {'w': mask}; a mask of all elements, a result of reduce, or a "
    "selection such as pyro_bmr.by_evidence()"
)


def model_grid(**factors: Mapping[str, Any]) -> ModelGrid:
    """Combine each option of one factor with each option of the others, as in SPM's PEB analyses.

    A model of the grid keeps what all of its options keep.

    Parameters
    ----------
    **factors : mapping
        By the name of the factor, its options: a mapping from names to sub-models, each as in
        `compare_models`.

    Returns
    -------
    ModelGrid
        A mapping from names, such as ``"forward|none"``, to sub-models, to pass to
        `compare_models`; its ``families`` have a partition for each factor.

    Raises
    ------
    ValueError
        If there is no factor, one has no option, or a name has a ``|``.
    TypeError
        If a factor is not a mapping from names.

    References
    ----------
    Zeidman et al. (2019), "A guide to group effective connectivity analysis, part 2: second level
    analysis with PEB", NeuroImage 200: commonalities and differences between groups.

    Examples
    --------
    >>> grid = model_grid(
    ...     commonalities={"both": {}, "none": {"* × mean": False}},
    ...     differences={"both": {}, "none": {"* × group": False}},
    ... )
    >>> list(grid)
    ['both|both', 'both|none', 'none|both', 'none|none']
    >>> grid.families["differences"]
    {'both': ('both|both', 'none|both'), 'none': ('both|none', 'none|none')}
    """
    if not factors:
        refuse("factors", {}, "one or more, such as commonalities={'both': {}, 'none': {...}}")
    for name, options in factors.items():
        expected = "a mapping from names to sub-models"
        check_kind(name, options, Mapping, expected)
        if not options:
            refuse(name, options, f"{expected}, of one or more")
        for option in options:
            check_kind(f"an option of {name}", option, str, "names that are words")
            if _BETWEEN in option:
                refuse(f"an option of {name}", option, f"a name without {_BETWEEN!r}")
    return ModelGrid({name: dict(options) for name, options in factors.items()})


_BETWEEN = "|"


@dataclass(frozen=True)
class ModelGrid(Mapping[str, Any]):
    """All combinations of options, one of each factor.

    Parameters
    ----------
    factors : mapping
        By factor, its options by name.

    Examples
    --------
    >>> grid = ModelGrid({"prior": {"wide": {}, "narrow": {}}, "layer": {"first": {}}})
    >>> list(grid)
    ['wide|first', 'narrow|first']
    """

    factors: Mapping[str, Mapping[str, Any]]

    def __getitem__(self, name: str) -> Any:
        options = name.split(_BETWEEN)
        if len(options) != len(self.factors):
            raise KeyError(name)
        chosen = zip(self.factors.values(), options, strict=True)
        return AllOf(tuple(factor[option] for factor, option in chosen))

    def __iter__(self) -> Iterator[str]:
        return map(_BETWEEN.join, itertools.product(*self.factors.values()))

    def __len__(self) -> int:
        return int(np.prod([len(options) for options in self.factors.values()]))

    @property
    def families(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """By factor and option, the names of the models that have it."""
        names = list(itertools.product(*self.factors.values()))
        return {
            factor: {
                option: tuple(_BETWEEN.join(name) for name in names if name[i] == option)
                for option in options
            }
            for i, (factor, options) in enumerate(self.factors.items())
        }


@dataclass(frozen=True)
class AllOf:
    """The sub-model that keeps what each of its parts keeps."""

    parts: tuple[Any, ...]


def list_models(models: Any) -> dict[str, Any]:
    """Read a table of sub-models: a mapping from names, or a data frame with a row for each."""
    import pandas as pd

    expected = f"sub-models by name, each of them {SUB_MODEL}"
    if isinstance(models, pd.DataFrame):
        columns = list(map(str, models.columns))
        values = models.to_numpy()
        models = {
            str(name): dict(zip(columns, row, strict=True))
            for name, row in zip(models.index, values, strict=True)
        }
    check_kind("models", models, Mapping, expected)
    if not models:
        refuse("models", models, expected)
    for name in models:
        check_kind("models", name, str, "names that are words")
    return dict(models)


@dataclass(frozen=True)
class ModelReader:
    """Reads sub-models of one posterior as vectors of what they keep.

    ``open``: True for elements that can go, ``gone`` for those that were pruned before and stay
    so. ``reasons``, by site, say why one cannot go.
    """

    names: ElementNames
    scores: ElementScores
    open: np.ndarray
    gone: np.ndarray
    reasons: Mapping[str, str]

    def read(self, models: Mapping[str, Any]) -> np.ndarray:
        """Return what each model keeps, ``(models, n)``, if only what can go is off."""
        return np.stack([self._read(f"models[{name!r}]", m) for name, m in models.items()])

    def _read(self, place: str, value: Any) -> np.ndarray:
        import pandas as pd

        masks = getattr(value, "masks", None)
        if isinstance(masks, Mapping):
            if getattr(value, "shrunk", 0):
                refuse(place, value, "a result of spikes, in which nothing was shrunk")
            return self._read(place, masks)
        if isinstance(value, AllOf):
            return np.logical_and.reduce([self._read(place, part) for part in value.parts])
        if isinstance(value, pd.Series):
            value = dict(zip(map(str, value.index), value.to_numpy(), strict=True))
        if isinstance(value, Mapping):
            return self._read_names(place, value)
        if isinstance(value, str):
            refuse(place, value, SUB_MODEL)
        if callable(value) and not isinstance(value, type | Tensor):
            return self._select(place, value)
        if not (isinstance(value, Tensor | list | tuple) or is_array(value)):
            refuse_kind(place, value, SUB_MODEL)
        mask = _read_mask(place, value)
        shapes = [tuple(shape) for shape in self.names.layout.shapes.values()]
        whole = [(self.names.layout.size,), *(shapes if len(shapes) == 1 else [])]
        if mask.shape not in whole:
            size = self.names.layout.size
            refuse(place, value, f"a mask of all {size:,} elements in order, or {SUB_MODEL}")
        return mask.reshape(-1) | ~self.open

    def _read_names(self, place: str, value: Mapping[Any, Any]) -> np.ndarray:
        kept = np.ones(self.names.layout.size, dtype=bool)
        for name, given in value.items():
            check_kind(place, name, str, "names of sites or elements")
            one = _read_mask(f"{place}[{name!r}]", given)
            if name in self.reasons and not one.all():
                self._refuse_closed(place, name, self.reasons[name])
            if name in self.reasons:
                continue
            where = self.names.find(place, name)
            if one.ndim:
                one = self._fit(f"{place}[{name!r}]", name, given, one)
            kept[where] = one
            can = self.open | self.gone
            if not (self.names.is_pattern(name) or kept[where].any() or can[where].any()):
                self._refuse_closed(place, name, self._obstacle(where))
        return kept | ~self.open

    def _fit(self, place: str, name: str, given: Any, mask: np.ndarray) -> np.ndarray:
        shape = tuple(self.names.layout.shapes.get(name, ()))
        try:
            return np.broadcast_to(mask, shape).reshape(-1)
        except ValueError:
            refuse(place, given, f"True, False, or a mask that broadcasts to {shape}")

    def _refuse_closed(self, place: str, name: str, reason: str) -> NoReturn:
        msg = (
            f"got {name!r} off in {place}, which cannot go: {reason}. Expected names of elements "
            "that can; patterns leave alone what cannot"
        )
        raise ValueError(msg)

    def _obstacle(self, where: Any) -> str:
        """Say why an element of a site that can be reduced cannot go."""
        first = np.arange(self.names.layout.size)[where].min()
        site = next(name for name, part in self.names.sites.items() if first < part.stop)
        return "; ".join(self.scores.obstacles(site)) or "it has no prior"

    def _select(self, place: str, select: Callable[..., Any]) -> np.ndarray:
        try:
            masks = checked_masks(select, self.scores)
        except (TypeError, ValueError) as error:
            error.add_note(f"in {place}")
            raise
        kept = np.ones(self.names.layout.size, dtype=bool)
        for name, mask in masks.items():
            kept[self.names.sites[name]] = mask.reshape(-1).cpu().numpy()
        return kept | ~self.open


def _read_mask(place: str, value: Any) -> np.ndarray:
    """Read truth values, or numbers that are 0 or 1."""
    if isinstance(value, bool | np.bool_):
        return np.asarray(value)
    if isinstance(value, Tensor):
        check_tensor(value, place)
        value = value.detach().cpu().numpy()
    try:
        mask = np.asarray(value)
    except Exception:
        refuse_kind(place, value, "True, False, or a mask of these")
    if mask.dtype.kind == "O":
        kinds = {type(one) for one in mask.reshape(-1)}
        mask = mask.astype(bool) if kinds <= {bool, np.bool_} else mask
    if mask.dtype.kind in "biuf" and np.isin(mask, (0, 1)).all():
        return mask.astype(bool)
    told = f"True (keep), False (off), or a mask of these, not {show(value)}"
    refuse(place, value, told)


def read_reader(
    scores: ElementScores, names: ElementNames, reasons: Mapping[str, str]
) -> ModelReader:
    """Make the reader of sub-models of these elements."""
    able, gone = np.zeros((2, names.layout.size), dtype=bool)
    for name, delta_f in scores.delta_f.items():
        can = scores.kept[name] & (delta_f < torch.inf)
        able[names.sites[name]] = can.reshape(-1).cpu().numpy()
        gone[names.sites[name]] = ~scores.kept[name].reshape(-1).cpu().numpy()
    return ModelReader(names, scores, able, gone, reasons)
