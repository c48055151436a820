"""Whether the shapes in a file fit together, before anything of their size is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.files.structure import check_shape, refuse


def check_guide(guide: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Check the shapes in a guide; return those of its sites."""
    sites: dict[str, tuple[int, ...]] = {}
    plates: dict[str, Any] = {}
    for i, factor in enumerate(guide["factors"]):
        where = f"/guide/factors/{i}"
        own = {one["name"]: tuple(one["shape"]) for one in factor["sites"]}
        if len(own) != len(factor["sites"]) or own.keys() & sites.keys():
            raise refuse([one["name"] for one in factor["sites"]], where, "each site once")
        sites |= own
        for j, site in enumerate(factor["sites"]):
            _check_site(site, own, plates, f"{where}/sites/{j}")
        if "values" in factor:
            (whole,), values = own.values(), factor["values"]
            check_shape(values, (max(1, len(values) if values.dim() else 0), *whole), where)
        elif factor["kind"] in {"dense", "low rank"}:
            _check_joint(factor["state"], sum(map(math.prod, own.values())), f"{where}/state")
        else:
            (whole,) = own.values()
            for key, value in factor["state"].items():
                check_shape(value, whole, f"{where}/state/{key}")
        kinds = {value.dtype for value in factor["state"].values() if value.is_floating_point()}
        if len(kinds) > 1:
            raise refuse(sorted(map(str, kinds)), f"{where}/state", "one floating-point type")
    return sites


def _check_joint(state: Mapping[str, Any], size: int, where: str) -> None:
    if "mask" in state:
        check_shape(state["mask"], (size,), f"{where}/mask")
        size = int(state["mask"].count_nonzero())
    for key, value in state.items():
        if key == "scale_tril_unconstrained":
            check_shape(value, (size, size), f"{where}/{key}")
        elif key == "cov_factor_unconstrained":
            check_shape(value, (size, *value.shape[1:2]), f"{where}/{key}")
        elif key != "mask":
            check_shape(value, (size,), f"{where}/{key}")


def _check_site(
    site: Mapping[str, Any],
    own: Mapping[str, tuple[int, ...]],
    plates: dict[str, Any],
    where: str,
) -> None:
    whole = tuple(site["shape"])
    if site["event_dim"] > len(whole):
        raise refuse(site["event_dim"], f"{where}/event_dim", f"at most {len(whole)}")
    for i, frame in enumerate(site["plates"]):
        name, dim, size, _, *full = frame
        whole_size = full[0] or size if full else size
        axis = None if dim is None else dim - site["event_dim"]
        known = plates.setdefault(name, (dim, size, whole_size))
        fits = axis is None or (-len(whole) <= axis < 0 and whole[axis] == whole_size >= size)
        if not fits or known != (dim, size, whole_size):
            raise refuse(frame, f"{where}/plates/{i}", f"a plate of a site of shape {whole}")
    if site.get("center"):
        _check_center(site["center"], whole, own, f"{where}/center")


def _check_center(
    center: Mapping[str, Any],
    whole: tuple[int, ...],
    others: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    for key in ("offset", "at_mean"):
        check_shape(center[key], whole, f"{where}/{key}")
    for name, weight in center["weights"].items():
        if name not in others:
            raise refuse(name, f"{where}/weights", f"one of the sites {sorted(others)}")
        expected = math.prod(whole), math.prod(others[name])
        check_shape(weight, expected, f"{where}/weights/{name}")


def check_handlers(handlers: list[Any], sites: Mapping[str, tuple[int, ...]]) -> None:
    """Check the shapes in handlers, from the outside in; those of sites change where one cuts."""
    if not handlers or handlers[0]["kind"] != "pruned":
        raise refuse([one["kind"] for one in handlers], "/handlers", "'pruned' first")
    for i, one in enumerate(handlers):
        where = f"/handlers/{i}"
        if one["kind"] == "pruned":
            check_sites(one["masks"], sites, f"{where}/masks")
            for name, center in one.get("centers", {}).items():
                if name not in sites:
                    raise refuse(name, f"{where}/centers", f"one of the sites {sorted(sites)}")
                _check_center(center, sites[name], sites, f"{where}/centers/{name}")
            for name in one.get("marginal", ()):
                if name not in one["masks"]:
                    raise refuse(name, f"{where}/marginal", f"one of {sorted(one['masks'])}")
        elif one["kind"] == "switched":
            for name, new in one["priors"].items():
                check_sites({name: new["mask"]}, sites, f"{where}/priors")
                for key, value in new["parameters"].items():
                    if tuple(value.shape) not in {(), sites[name]}:
                        place = f"{where}/priors/{name}/parameters/{key}"
                        raise refuse(value, place, f"a number, or the shape {sites[name]}")
        else:
            sites = _check_cut(one["cut"], sites, f"{where}/cut")


def check_masks(guide: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
    """Check that a guide and its model keep the same elements."""
    for i, factor in enumerate(guide["factors"]):
        sizes = [math.prod(site["shape"]) for site in factor["sites"]]
        kept = factor["state"].get("mask", torch.ones(sum(sizes), dtype=torch.bool, device="cpu"))
        for site, own in zip(factor["sites"], kept.reshape(-1).split(sizes), strict=True):
            model = masks.get(site["name"], torch.ones_like(own)).reshape(-1)
            if not torch.equal(own, model):
                place = f"/guide/factors/{i}/state/mask"
                raise refuse(own.tolist(), place, f"the mask of {site['name']!r} in the model")


def check_sites(
    by_site: Mapping[str, Any], sites: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Check that tensors have the shapes of their sites."""
    for name, value in by_site.items():
        if name not in sites:
            raise refuse(name, where, f"one of the sites {sorted(sites)}")
        check_shape(value, sites[name], f"{where}/{name}")


def _check_cut(
    cut: Mapping[str, Any], sites: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, tuple[int, ...]]:
    """Check what is cut; return the shapes of the sites before."""
    if cut["shapes"].keys() != cut["sites"].keys() or not cut["sites"].keys() <= sites.keys():
        raise refuse(sorted(cut["shapes"]), f"{where}/shapes", f"sites among {sorted(sites)}")
    for name, whole in cut["shapes"].items():
        kept, place = cut["sites"][name], f"{where}/sites/{name}"
        if len(kept) != len(whole):
            raise refuse(kept, place, f"one for each axis of {tuple(whole)}")
        for axis, (size, index) in enumerate(zip(whole, kept, strict=True)):
            if index is not None and len(index) and int(index[-1]) >= size:
                raise refuse(index.tolist(), f"{place}/{axis}", f"indices below {size}")
        left = tuple(s if i is None else len(i) for s, i in zip(whole, kept, strict=True))
        if left != sites[name]:
            raise refuse(left, place, f"the shape {sites[name]} of the guide")
    for i, one in enumerate(cut["tensors"]):
        if ("parameter" in one) != ("constraint" in one):
            raise refuse(sorted(one), f"{where}/tensors/{i}", "a constraint of each parameter")
    for i, (_, patterns) in enumerate(cut["rewrites"]):
        for j, pattern in enumerate(patterns):
            _check_pattern(pattern, f"{where}/rewrites/{i}/{j}")
    return {**sites, **{name: tuple(whole) for name, whole in cut["shapes"].items()}}


def _check_pattern(pattern: Mapping[str, Any], where: str) -> None:
    said = {tuple(place): size for place, size in pattern["sizes"]}
    for change in pattern["changes"]:
        for place, value in [] if change is None else change["values"]:
            before = said.get(tuple(place), ())
            if not _is_smaller(value, before):
                raise refuse(value, f"{where}/changes", f"no more than {before}")


def _is_smaller(value: Any, before: Any) -> bool:
    if isinstance(value, list):
        same = isinstance(before, list) and len(before) == len(value)
        return same and all(map(_is_smaller, value, before))
    return value == -1 or (isinstance(before, int) and 0 <= value <= before)
