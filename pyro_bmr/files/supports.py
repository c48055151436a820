"""Supports of sites, and constraints of parameters, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import MixtureSameFamilyConstraint

from pyro_bmr.files.structure import Check, by_kind, count, entries, number, text

_NAMED = (
    "real",
    "positive",
    "nonnegative",
    "unit_interval",
    "softplus_positive",
    "simplex",
    "lower_cholesky",
    "softplus_lower_cholesky",
    "unit_lower_cholesky",
    "corr_cholesky",
    "positive_definite",
    "ordered_vector",
    "positive_ordered_vector",
    "sphere",
)
_BOUNDED = {
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "less_than": ("upper_bound",),
    "interval": ("lower_bound", "upper_bound"),
    "half_open_interval": ("lower_bound", "upper_bound"),
}


def pack_support(support: Any, what: str) -> dict[str, Any]:
    """Describe the support of ``what`` by name and bounds; an unknown one raises ValueError."""
    for name in _NAMED:
        known = getattr(constraints, name)
        if support is known or (type(support) is type(known) and _plain(support) == _plain(known)):
            return {"name": name}
    for name, bounds in _BOUNDED.items():
        if type(support) is getattr(constraints, name):
            return {"name": name, **{bound: getattr(support, bound) for bound in bounds}}
    if type(support) is constraints.independent:
        inner = pack_support(support.base_constraint, what)
        return {
            "name": "independent",
            "inner": inner,
            "ndims": support.reinterpreted_batch_ndims,
        }
    if type(support) is MixtureSameFamilyConstraint:
        return {"name": "mixture", "inner": pack_support(support.base_constraint, what)}
    msg = (
        f"cannot save {what}, whose values are constrained by {support!r}. Expected one of "
        f"{', '.join((*_NAMED, *_BOUNDED))}, of torch.distributions.constraints"
    )
    raise ValueError(msg)


def unpack_support(packed: Mapping[str, Any]) -> Any:
    """Make the support that `pack_support` described: the same object where that has a name."""
    name = packed["name"]
    if name == "independent":
        return constraints.independent(unpack_support(packed["inner"]), packed["ndims"])
    if name == "mixture":
        return MixtureSameFamilyConstraint(unpack_support(packed["inner"]))
    if name in _NAMED:
        return getattr(constraints, name)
    return getattr(constraints, name)(*(packed[bound] for bound in _BOUNDED[name]))


def check_support(packed: Any, where: str) -> None:
    """Raise a `StructureError` if plain data are not what `pack_support` made."""
    by_kind(_KINDS, "name")(packed, where)


def _check_bound(value: Any, where: str) -> None:
    if not isinstance(value, Tensor):
        number(value, where)


_KINDS: dict[str, Check] = {
    **dict.fromkeys(_NAMED, entries({"name": text})),
    **{
        name: entries({"name": text, **dict.fromkeys(bounds, _check_bound)})
        for name, bounds in _BOUNDED.items()
    },
    "independent": entries({"name": text, "inner": check_support, "ndims": count}),
    "mixture": entries({"name": text, "inner": check_support}),
}


def _plain(support: Any) -> dict[str, Any]:
    # Bounds that are tensors are told apart by nothing but their identity.
    return {k: id(v) if isinstance(v, Tensor) else v for k, v in vars(support).items()}
