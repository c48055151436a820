"""What a file of a result holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_bmr.cutting.planning import LayerCut
from pyro_bmr.files.moments import check_moments
from pyro_bmr.files.shapes import check_guide, check_handlers, check_masks, check_sites
from pyro_bmr.files.structure import (
    Check,
    booleans,
    by_kind,
    count,
    entries,
    finite,
    flag,
    floats,
    indices,
    integer,
    mapping,
    number,
    one_of,
    optional,
    record,
    refuse,
    sequence,
    shape,
    tensor,
    text,
)
from pyro_bmr.files.supports import check_support
from pyro_bmr.mathematics.reduced_priors import RESTS
from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary


def check_result(plan: Any) -> None:
    """Raise a `StructureError` if plain data are not what `Reduction.save` and its like wrote."""
    _RESULT(plan, "")
    if plan["kind"] == "moments":
        sites = check_moments(plan["moments"])
        for key in ("masks", "scores"):
            check_sites(plan[key], sites, f"/{key}")
        return
    sites = check_guide(plan["guide"])
    check_handlers(plan["handlers"], sites)
    check_masks(plan["guide"], plan["handlers"][0]["masks"])
    for key in ("masks", "scores"):
        check_sites(plan.get(key, {}), sites, f"/{key}")
    if plan["kind"] == "reduction":
        _check_rows(plan["rows"], sites)
        if (plan.get("realised") is None) != (plan.get("realised_error") is None):
            raise refuse(plan.get("realised_error"), "/realised_error", "one where F was measured")
    _check_places(plan["model"])


def _check_rows(rows: list[Any], sites: Mapping[str, tuple[int, ...]]) -> None:
    held = {one["name"]: tuple(one["shape"]) for one in rows if one.get("held", True)}
    if held != sites:
        raise refuse(held, "/rows", f"the sites of the guide, {sites}")


def _check_places(model: Mapping[str, Any]) -> None:
    modules = model["modules"]
    for name, one in model["params"].items():
        where = f"/model/params/{name}"
        if ("place" in one) == ("value" in one):
            raise refuse(sorted(one), where, "either a place or a value")
        index, key = one.get("place", (0, None))
        if key is not None and not (index < len(modules) and key in modules[index]):
            raise refuse(one["place"], f"{where}/place", "a tensor of the modules")


def _place(value: Any, where: str) -> None:
    """Check where in a call a size stands: an argument by position or name, and an item of it."""
    sequence(lambda _value, _where: None, 2)(value, where)
    (count if isinstance(value[0], int) else text)(value[0], where)
    optional(count)(value[1], where)


def _size(value: Any, where: str) -> None:
    if isinstance(value, list):
        sequence(_size)(value, where)
    else:
        integer(value, where)


def _pair(first: Check, second: Check) -> Check:
    def check(value: Any, where: str) -> None:
        sequence(lambda _value, _where: None, 2)(value, where)
        first(value[0], f"{where}/0")
        second(value[1], f"{where}/1")

    return check


def _owner(value: Any, where: str) -> None:
    (text if isinstance(value, str) else count)(value, where)


def _frame(value: Any, where: str) -> None:
    """Check a frame of a plate: name, dimension, size, counter, and the full size."""
    if not isinstance(value, list) or len(value) not in {4, 5}:
        raise refuse(value, where, "a plate")
    checks = (text, optional(integer), count, integer, optional(count))
    for one, check in zip(value, checks[: len(value)], strict=True):
        check(one, where)


def _seen(value: Any, where: str) -> None:
    """Check what became of a site: its shape, or that the guide does not hold it."""
    if isinstance(value, str):
        one_of("observed", "not in the guide")(value, where)
    else:
        shape(value, where)


_CENTER = entries({"offset": floats, "at_mean": booleans, "weights": mapping(floats)})
_SITE = entries(
    {
        "name": text,
        "shape": shape,
        "event_dim": count,
        "support": check_support,
        "plates": sequence(_frame),
    },
    {"center": optional(_CENTER), "rest": one_of(*RESTS)},
)
_MASK = {"mask": booleans}


def _factor(
    state: tuple[str, ...], more: Mapping[str, Check] | None = None, *, joint: bool = False
) -> Check:
    own = entries({f"{name}_unconstrained": finite for name in state}, _MASK if state else None)
    sites = sequence(_SITE) if joint else sequence(_SITE, 1)
    return entries({"kind": text, "sites": sites, "state": own, **(more or {})})


_JOINT = {
    "dense": _factor(("loc", "scale", "scale_tril"), joint=True),
    "low rank": _factor(("loc", "scale", "cov_factor"), joint=True),
}
_FACTORS = {
    "independent": _factor(("loc", "scale"), {"scale_constraint": check_support}),
    "gamma": _factor(("concentration", "mean")),
    "program": _factor((), {"values": floats, "reason": text}),
    **_JOINT,
}
_INDICES = mapping(sequence(optional(indices)))
_CHANGE = entries({"function": text, "values": sequence(_pair(_place, _size))})
_PATTERN = entries(
    {
        "sizes": sequence(_pair(_place, optional(_size))),
        "changes": sequence(optional(_CHANGE)),
        "where": text,
    }
)
_CUT = entries(
    {
        "shapes": mapping(shape),
        "sites": _INDICES,
        "plates": mapping(indices),
        "rewrites": sequence(_pair(text, sequence(_PATTERN))),
        "tensors": sequence(
            entries(
                {"place": _pair(_owner, text), "value": tensor},
                {"parameter": text, "constraint": check_support},
            )
        ),
    }
)
_PRIOR = entries(
    {
        "mask": booleans,
        "family": one_of("Normal", "Laplace"),
        "parameters": entries({"loc": floats, "scale": floats}),
    }
)
_HANDLERS = {
    "pruned": entries(
        {"kind": text, "masks": mapping(booleans)},
        {"centers": mapping(_CENTER), "marginal": sequence(text)},
    ),
    "switched": entries({"kind": text, "priors": mapping(_PRIOR)}),
    "compacted": entries({"kind": text, "cut": _CUT}),
}
_PARAM = entries({"constraint": check_support}, {"value": tensor, "place": _pair(count, text)})
_MODEL = entries(
    {
        "sites": mapping(_seen),
        "families": mapping(text),
        "modules": sequence(mapping(tensor)),
        "params": mapping(_PARAM),
    }
)
_GUIDE = entries(
    {"factors": sequence(by_kind(_FACTORS)), "create_plates": flag},
    {"program": sequence(text), "hidden": sequence(text), "program_state": mapping(tensor)},
)
_PROGRAM = {
    "kind": text,
    "model": _MODEL,
    "handlers": sequence(by_kind(_HANDLERS)),
    "guide": _GUIDE,
}
_FOUND = {
    "masks": mapping(booleans),
    "scores": mapping(floats),
    "rows": sequence(record(SiteSummary)),
    "naive_delta_f": optional(number),
    "layers": sequence(record(LayerSummary)),
}
_MEASURED = {
    "realised": optional(number),
    "realised_error": optional(number),
    "notes": sequence(text),
    "rounds": sequence(record(Round)),
}
_NAMED = entries({"name": text, "shape": shape, "labels": sequence(sequence(text))})
_MOMENTS = entries(
    {
        "sites": sequence(_NAMED),
        **dict.fromkeys(("mean", "spread", "prior_mean", "prior_spread"), finite),
        "kept": booleans,
        "free_energy": optional(number),
    }
)
_RESULT = by_kind(
    {
        "moments": entries({"kind": text, "moments": _MOMENTS, **_FOUND}, _MEASURED),
        "reduction": entries({**_PROGRAM, **_FOUND}, _MEASURED),
        "compaction": entries(
            {
                **_PROGRAM,
                "layers": sequence(record(LayerCut)),
                "kept": _INDICES,
                "inputs": _INDICES,
                "used_inputs": _INDICES,
                "elements": sequence(count, 2),
            }
        ),
    }
)
