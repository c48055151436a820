"""Families of named models, and priors over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyro_bmr.arguments.arrays import check_tensor
from pyro_bmr.arguments.checks import check_kind, read_positive, refuse, refuse_kind
from pyro_bmr.arguments.patterns import match_names, refuse_name
from pyro_bmr.averaging.element_names import ElementNames
from pyro_bmr.averaging.named_models import ModelGrid
from pyro_bmr.moments.names import read_numbers

# By partition, by family, the models in it.
Families = dict[str, dict[str, tuple[str, ...]]]
ALONE = "family"

FAMILIES = (
    "names of models by family, such as {'forward': ['H1', 'H2'], 'none': 'null*'}, or several "
    "such partitions by name"
)


def read_families(families: Any, models: tuple[str, ...]) -> Families:
    """Read one partition of the models into families, or several by name; patterns are names."""
    if families is None:
        return {}
    if isinstance(families, ModelGrid):
        families = families.families
    check_kind("families", families, Mapping, FAMILIES)
    several = [isinstance(one, Mapping) for one in families.values()]
    if not families or any(several) != all(several):
        refuse("families", families, FAMILIES)
    partitions = families if all(several) else {ALONE: families}
    return {name: _read_partition(name, one, models) for name, one in partitions.items()}


def _read_partition(
    name: Any, partition: Mapping[Any, Any], models: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    check_kind("families", name, str, FAMILIES)
    families: dict[str, tuple[str, ...]] = {}
    of_model: dict[str, str] = {}
    for family, members in partition.items():
        check_kind("families", family, str, FAMILIES)
        listed = (members,) if isinstance(members, str) else members
        if not isinstance(listed, Iterable):
            refuse_kind(f"families[{family!r}]", members, "names of models")
        mine: dict[str, None] = {}
        for one in listed:
            found = [one] if one in models else match_names(str(one), models)
            if not found:
                place = f"families[{family!r}]"
                refuse_name(place, one, models, "a model, or a pattern such as 'H*',")
            mine |= dict.fromkeys(found)
        for model in mine:
            if model in of_model:
                told = f"{model!r} in {of_model[model]!r} and {family!r}"
                refuse("families", told, "each model in one family")
            of_model[model] = family
        families[family] = tuple(mine)
    missing = [model for model in models if model not in of_model]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        told = f"no family for {', '.join(map(repr, missing[:5]))}{more}"
        refuse("families", told, "each model in one family")
    return families


@dataclass(frozen=True)
class PriorReader:
    """Reads a prior over models as log probabilities.

    ``kept`` is what each model keeps, ``(models, n)``.
    """

    models: tuple[str, ...]
    families: Families
    names: ElementNames
    kept: np.ndarray

    def read(self, prior: Any, expected: Any) -> np.ndarray:
        """Return ln P of each model, ``(models,)``."""
        if expected is not None:
            if prior is not None:
                refuse("prior", prior, "either prior= or expected=, not both")
            return self._by_size(expected)
        if prior is None:
            return _normalised(self._equal_families())
        if isinstance(prior, Mapping):
            known = [name in self.models for name in prior]
            if prior and all(known):
                return self._by_model(prior)
            return self._by_element(prior)
        part = _read_probability("prior", prior, ())
        return self._by_odds(np.full(self.kept.shape[1], _logit(part)))

    def _equal_families(self) -> np.ndarray:
        """Divide 1 among the families, and that of each among its models.

        P(m) = 1 / (F n_f) (Penny et al. 2010, PLoS Comput. Biol. 6(3), eqs. 10-12); of several
        partitions, a family is a combination of one of each.
        """
        cell = np.zeros(len(self.models), dtype=int)
        place = {name: i for i, name in enumerate(self.models)}
        for families in self.families.values():
            mine = np.zeros_like(cell)
            for i, members in enumerate(families.values()):
                mine[[place[one] for one in members]] = i
            cell = cell * len(families) + mine
        _, which, count = np.unique(cell, return_inverse=True, return_counts=True)
        return -np.log(count[which])

    def _by_model(self, prior: Mapping[str, Any]) -> np.ndarray:
        missing = [name for name in self.models if name not in prior]
        if missing:
            told = f"none for {', '.join(map(repr, missing[:5]))}"
            refuse("prior", told, "a probability or a weight for each model")
        weights = [read_positive(f"prior[{name!r}]", prior[name]) for name in self.models]
        return _normalised(np.log(weights))

    def _by_element(self, prior: Mapping[Any, Any]) -> np.ndarray:
        log_odds = np.zeros(self.kept.shape[1])
        for name, value in prior.items():
            check_kind("prior", name, str, "names of models, sites or elements")
            place = f"prior[{name!r}]"
            if name in self.models:
                others = [one for one in prior if one not in self.models]
                refuse("prior", [name, *others[:3]], "names of models, or of elements, not of both")
            where = self.names.find("prior", name)
            shape = tuple(self.names.layout.shapes.get(name, ()))
            log_odds[where] = _logit(_read_probability(place, value, shape)).reshape(-1)
        return self._by_odds(log_odds)

    def _by_size(self, expected: Any) -> np.ndarray:
        question = self._in_question().sum()
        size = read_positive("expected", expected, "how many elements are present before the data")
        if size >= question:
            told = f"fewer than the {question:,} elements that some models have and others have not"
            refuse("expected", expected, told)
        return self._by_odds(np.full(self.kept.shape[1], _logit(np.asarray(size / question))))

    def _by_odds(self, log_odds: np.ndarray) -> np.ndarray:
        """Give each model the product of the odds of what it has, of what models differ in."""
        question = self._in_question()
        return _normalised(self.kept[:, question] @ log_odds[question])

    def _in_question(self) -> np.ndarray:
        return np.asarray(self.kept.any(0) & ~self.kept.all(0))


def _normalised(log_weight: np.ndarray) -> np.ndarray:
    return log_weight - np.logaddexp.reduce(log_weight)


def _logit(part: np.ndarray) -> np.ndarray:
    return np.log(part) - np.log1p(-part)


def _read_probability(place: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    expected = (
        "the probability that an element is present, between 0 and 1 and neither of them; such "
        "numbers by name of sites, elements or patterns; or a weight for each model by name"
    )
    if isinstance(value, str | bool | list | tuple | set | dict) or value is None:
        refuse(place, value, expected)
    if isinstance(value, Tensor):
        check_tensor(value, place)
    part = read_numbers(place, value).cpu().numpy()
    if not ((part > 0) & (part < 1)).all():
        refuse(place, value, expected)
    try:
        return np.broadcast_to(part, shape) if part.ndim else part
    except ValueError:
        refuse(place, value, f"a number, or a shape that broadcasts to {shape}")
