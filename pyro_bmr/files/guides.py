"""The guide of a reduction as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_bmr.factors.factor import Factor
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.independent import IndependentFactor
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.files.centers import pack_center, unpack_center
from pyro_bmr.files.supports import pack_support, unpack_support
from pyro_bmr.guides.guide_program import GuideProgram
from pyro_bmr.guides.pruned_guide import Origin, PrunedGuide
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.programs.sites import Site


def pack_guide(guide: PrunedGuide) -> dict[str, Any]:
    """Describe a guide: its factors, with their parameters as the optimiser sees them."""
    factors = []
    for part in guide.parts:
        factor = part.factor()
        packed = {
            "kind": _KIND[type(getattr(factor, "posterior", factor))],
            "sites": [_pack_site(site) for site in factor.sites],
            "state": dict(part.state_dict()),
        }
        if isinstance(factor, IndependentFactor):
            what = f"the scale of the site {factor.site.name!r}"
            packed["scale_constraint"] = pack_support(factor.scale_constraint, what)
        if isinstance(factor, ProgramFactor):
            packed |= {"values": factor.values, "reason": factor.reason}
        factors.append(packed)
    program = guide.program
    return {
        "factors": factors,
        "create_plates": guide.origin.create_plates is not None,
        "program": [] if program is None else sorted(program.sites),
        "hidden": [] if program is None else sorted(program.hidden),
        "program_state": {} if program is None else dict(program.state_dict()),
    }


def unpack_guide(packed: Mapping[str, Any], origin: Origin) -> PrunedGuide:
    """Make the guide that `pack_guide` described, with the same parameters bit for bit."""
    if packed["create_plates"] and origin.create_plates is None:
        msg = (
            "the guide that was saved had a function that makes its plates, which is not saved. "
            "Expected the same function again: load(path, model, create_plates=...)"
        )
        raise ValueError(msg)
    if packed.get("program") and origin.program is None:
        msg = (
            f"the sites {packed['program']} are drawn by the guide that was reduced, which is not "
            "saved. Expected that guide again, with the parameters that it had where it is a "
            "function: load(path, model, guide=guide)"
        )
        raise ValueError(msg)
    if origin.program is not None:
        sites, hidden = (frozenset(packed.get(key, ())) for key in ("program", "hidden"))
        program = origin.program.of(sites, hidden) if packed.get("program") else None
        origin = replace(origin, program=program)
    factors = tuple(_FACTOR[one["kind"]](one) for one in packed["factors"])
    guide = PrunedGuide(factors, origin)
    for part, one in zip(guide.parts, packed["factors"], strict=True):
        part.load_state_dict(one["state"])
    if guide.program is not None:
        _load_program(guide.program, packed.get("program_state", {}))
    return guide


def _load_program(program: GuideProgram, state: Mapping[str, Any]) -> None:
    # Earlier files have nothing of what is run.
    if not state:
        return
    try:
        program.load_state_dict(dict(state))
    except RuntimeError as error:
        msg = (
            f"the guide= that load got has other parameters than the one that was reduced ({error})"
            ". Expected one that was made by the same code, and called once"
        )
        raise ValueError(msg) from error


def _pack_site(site: Site) -> dict[str, Any]:
    return {
        "name": site.name,
        "shape": list(site.shape),
        "event_dim": site.event_dim,
        "support": pack_support(site.support, f"the site {site.name!r}"),
        "plates": [list(frame) for frame in site.plates],
        "center": None if site.center is None else pack_center(site.center),
        "rest": site.rest,
    }


def _unpack_sites(packed: Mapping[str, Any]) -> tuple[Site, ...]:
    return tuple(
        Site(
            one["name"],
            torch.Size(one["shape"]),
            one["event_dim"],
            unpack_support(one["support"]),
            tuple(CondIndepStackFrame(*frame) for frame in one["plates"]),
            unpack_center(one["center"]) if one.get("center") else None,
            one.get("rest", "conditional"),
        )
        for one in packed["sites"]
    )


# Factors of the right kind and shape; a guide then takes the state that was saved.
def _independent(packed: Mapping[str, Any]) -> Factor:
    (site,), state = _unpack_sites(packed), packed["state"]
    loc, scale = state["loc_unconstrained"], state["scale_unconstrained"]
    constraint = unpack_support(packed["scale_constraint"])
    return IndependentFactor(site, loc, scale, constraint, state.get("mask"))


def _dense(packed: Mapping[str, Any]) -> Factor:
    loc = packed["state"]["loc_unconstrained"]
    identity = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    return JointFactor(_unpack_sites(packed), Dense(loc, identity), packed["state"].get("mask"))


def _low_rank(packed: Mapping[str, Any]) -> Factor:
    loc, columns = (packed["state"][f"{key}_unconstrained"] for key in ("loc", "cov_factor"))
    posterior = LowRank(loc, columns, torch.ones_like(loc))
    return JointFactor(_unpack_sites(packed), posterior, packed["state"].get("mask"))


def _gamma(packed: Mapping[str, Any]) -> Factor:
    (site,), state = _unpack_sites(packed), packed["state"]
    ones = torch.ones_like(state["mean_unconstrained"])
    return GammaFactor(site, ones, ones, state.get("mask"))


def _program(packed: Mapping[str, Any]) -> Factor:
    (site,) = _unpack_sites(packed)
    return ProgramFactor(site, packed["values"], packed["reason"])


_KIND: dict[type, str] = {
    IndependentFactor: "independent",
    Dense: "dense",
    LowRank: "low rank",
    GammaFactor: "gamma",
    ProgramFactor: "program",
}
_FACTOR: dict[str, Callable[[Mapping[str, Any]], Factor]] = {
    "independent": _independent,
    "dense": _dense,
    "low rank": _low_rank,
    "gamma": _gamma,
    "program": _program,
}
