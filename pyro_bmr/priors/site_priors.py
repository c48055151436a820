"""The priors of the sites of a guide, and why a site stays whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from pyro_bmr.arguments.patterns import find_names, list_some, suggest
from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.priors.all_rows import read_unchecked
from pyro_bmr.priors.dependence import find_parents
from pyro_bmr.priors.divergences import read_divergences
from pyro_bmr.priors.expected_priors import expect_priors
from pyro_bmr.priors.families import (
    Reading,
    UnreadablePriorError,
    UnregisteredPriorError,
    check_readings,
    is_transformed_by_support,
)
from pyro_bmr.programs.distributions import find_core, find_element_support, is_positive
from pyro_bmr.programs.dry_run import find_modules
from pyro_bmr.programs.model_runs import ModelRuns, find_sources
from pyro_bmr.programs.site_kinds import is_computed, is_latent, is_likelihood
from pyro_bmr.programs.sites import Site, find_full_shape, is_scaled


def read_priors(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    factors: Sequence[Factor],
    sites: Iterable[str] | None = None,
    failures: Mapping[str, str] | None = None,
    also: Collection[str] = (),
    measured: Mapping[str, str] | None = None,
) -> tuple[dict[str, Prior], dict[str, str], dict[str, torch.Size]]:
    """Run the model at the posterior's location and read the prior of the sites to be reduced.

    Where a prior depends on other sites, the model runs again at draws of these, and the prior is
    the expected one: see `pyro_bmr.priors.expected_priors`. A site that enters it times zero, say,
    and so never changes it, is none of these. Where it depends on learnable parameters, it is read
    at their current values. Dependence is found through tensors: a model that turns a sampled value
    into a Python number, or branches on it, and makes a prior of that, hides it.

    A site that the prior of a reduced site depends on stays whole, because ΔF would not add up;
    naming it instead reduces it and leaves those whole. By default ``sites`` are all over the real
    line; one with another support is reduced, in unconstrained coordinates, only if it is named,
    or if it is among ``also``. ``failures`` say of sites why they cannot be reduced. Positive ones
    that are ``measured`` need no density at zero, or cannot be reduced for the reason given.

    Returns the priors of the sites that may be reduced, why each other latent site stays whole, and
    the shapes of those that the guide does not hold.
    A ValueError says that guide and model do not fit, or that a named site cannot be reduced.
    """
    locations = {
        site.name: (site, loc)
        for factor in factors
        for site, loc in zip(factor.sites, factor.locations().values(), strict=True)
    }
    runs = ModelRuns(model, args, kwargs, locations)
    nodes, leaves = runs.here()
    latent = {name: node for name, node in nodes.items() if is_latent(node)}
    _check_held(locations, nodes, latent)
    absent = {name: node for name, node in latent.items() if name not in locations}
    reasons = {name: _absence(node) for name, node in absent.items()}
    readable: dict[str, _Readable] = {}
    modules = find_modules(model)
    obstacles = {site.name: factor.obstacle for factor in factors for site in factor.sites}
    obstacles |= failures or {}
    measured = measured or {}
    unseen = "" if any(map(is_likelihood, nodes.values())) else "the model observes nothing"
    obstacles |= {name: reason or unseen for name, reason in measured.items()}
    reasons |= {name: obstacles[name] for name in measured if obstacles[name]}
    reasons |= {f.site.name: f.reason for f in factors if isinstance(f, ProgramFactor)}
    for name in (name for name in latent if name in locations and name not in reasons):
        try:
            site = locations[name][0]
            found = _read(runs, nodes, site, latent, leaves, density=name not in measured)
            _check_parameters(latent[name], nodes, leaves, modules)
        except (UnregisteredPriorError, UnreadablePriorError) as error:
            reasons[name] = str(error)
            continue
        if obstacles[name]:
            reasons[name] = obstacles[name]
        else:
            readable[name] = found
    readings = {n: one.reading for n, one in readable.items() if one.reading is not None}
    sound, useless = check_readings(readings)
    reasons |= useless
    readable = {
        name: replace(one, reading=sound.get(name))
        for name, one in readable.items()
        if name not in useless
    }
    parents = find_parents(
        runs,
        {name: node["fn"] for name, node in latent.items()},
        leaves,
        {name: found.parents for name, found in readable.items() if found.parents},
    )
    readable |= {name: replace(readable[name], parents=them) for name, them in parents.items()}
    # pyro.sample(name, ..., obs_mask=mask) makes a latent site of what is missing.
    missing = {
        name
        for name in readable
        if name.endswith("_unobserved") and f"{name.removesuffix('_unobserved')}_observed" in nodes
    }
    chosen = _choose(sites, readable, missing, also, reasons)
    priors = _priors(runs, factors, {name: readable[name] for name in chosen}, reasons)
    if sites is not None:
        check_named(chosen, readable, reasons)
    return priors, reasons, {name: find_full_shape(node) for name, node in absent.items()}


def choose_named(
    named: Iterable[str], readable: Collection[str], reasons: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the sites that are meant by ``sites=``: of fields and patterns, those that can go."""
    known = sorted({*readable, *reasons})
    chosen: dict[str, None] = {}
    for name in named:
        found = find_names(name, known) or [name]
        chosen |= dict.fromkeys([one for one in found if one in readable] or found)
    check_named(chosen, readable, reasons)
    return tuple(chosen)


def check_named(
    named: Collection[str],
    readable: Collection[str],
    reasons: Mapping[str, str],
    option: str = "sites",
) -> None:
    """Raise a ValueError if a caller names, as ``option``, no site or one that is not readable."""
    if not named:
        msg = f"got an empty {option}=. Expected names of sample sites, or None for all"
        raise ValueError(msg)
    known = sorted({*readable, *reasons})
    unknown = sorted(set(named).difference(known))
    if unknown:
        msg = f"{option}= names {unknown}. Expected some of [{list_some(known)}]"
        raise ValueError(msg + suggest(unknown[0], known))
    refused = sorted(set(named) & reasons.keys())
    whole = "; ".join(f"{name!r}: {reasons[name]}" for name in refused[:5])
    if whole:
        msg = (
            f"{option}= names sites that cannot be reduced: {whole}. Expected some of "
            f"[{list_some(sorted(readable))}]; leave these out"
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class _Readable:
    """A site that may be reduced: its prior at the location, and the sites that this depends on.

    There is no ``reading`` of a prior that is measured.
    """

    site: Site
    support: constraints.Constraint
    reading: Reading | None
    parents: tuple[str, ...]


def _check_held(held: Iterable[str], nodes: Mapping[str, Any], latent: Mapping[str, Any]) -> None:
    for name in held:
        if name not in latent:
            computed = name in nodes and is_computed(nodes[name])
            observed = "computed from others" if computed else "observed"
            fate = observed if name in nodes else "not in the model"
            msg = (
                f"the guide holds the site {name!r}, which is now {fate}. Expected the model that "
                f"the guide was trained for, which has the latent sites {sorted(latent)}. Pass "
                "that model, or the arguments under which it has this site"
            )
            raise ValueError(msg)


def _absence(node: Any) -> str:
    if getattr(node["fn"].support, "is_discrete", False):
        return "it is discrete"
    return "the guide does not hold it"


def _read(
    runs: ModelRuns,
    nodes: Mapping[str, Any],
    site: Site,
    latent: Collection[str],
    leaves: Mapping[str, Tensor],
    *,
    density: bool,
) -> _Readable:
    """Read a site and maybe its density at zero, or say why it cannot be reduced."""
    node = nodes[site.name]
    mask_sources, parents = (
        find_sources(value, leaves) & set(latent)
        for value in ((node["mask"], node["scale"]), node["fn"])
    )
    obstacle = (
        (density and _obstacle_of_support(node["fn"]))
        or _depends("mask or scale", mask_sources)
        or _depends("prior", parents - leaves.keys(), ", which the guide does not hold")
        or _obstacle_of_scale(node)
        or (not density and _obstacle_of_mask(node))
    )
    if obstacle:
        raise UnreadablePriorError(obstacle)
    _check_shape(node, site)
    # As the model has it: that of the guide may be a copy, which torch does not take for the same.
    support = find_element_support(node["fn"].support)
    reading = read_unchecked(site.name, nodes, runs.at_rows) if density else None
    if reading is not None and reading.joint is not None and parents:
        msg = f"its prior is correlated, and depends on {_listed(parents)}"
        raise UnreadablePriorError(msg)
    return _Readable(site, support, reading, tuple(sorted(parents)))


def _check_parameters(
    node: Any,
    nodes: Mapping[str, Any],
    leaves: Mapping[str, Tensor],
    modules: Iterable[torch.nn.Module],
) -> None:
    """Refuse a prior that is read from a parameter as it was before training."""
    store = pyro.get_param_store()
    owned = {path for module in modules for path, _ in module.named_parameters()}
    # Parameters of a module that is called otherwise than it stands, as in a compacted model.
    named = {
        f"{part._pyro_name}.{key}".removesuffix("_unconstrained")
        for module in modules
        for part in module.modules()
        if isinstance(part, PyroModule)
        for key, _ in part.named_parameters(recurse=False)
    }
    lost = {
        source
        for source in find_sources(node["fn"], leaves) - set(leaves)
        if nodes[source]["type"] == "param"
        and source not in store
        and source not in named
        and not any(source.endswith(path.removesuffix("_unconstrained")) for path in owned)
    }
    if lost:
        msg = (
            f"its prior depends on the parameter {_listed(lost)}, which the param store does not "
            "hold: load the store that was saved after training"
        )
        raise UnreadablePriorError(msg)


def _obstacle_of_support(fn: Any) -> str:
    support = find_element_support(fn.support)
    if support.is_discrete:
        return "it is discrete"
    readable = support is constraints.real or is_transformed_by_support(find_core(fn))
    return "" if readable else _constrained(support)


def _depends(what: str, sources: Collection[str], qualifier: str = "") -> str:
    return f"its {what} depends on {_listed(sources)}{qualifier}" if sources else ""


def _obstacle_of_scale(node: Any) -> str:
    if is_scaled(node):
        return "its log density is scaled (poutine.scale), so that its prior is tempered"
    return "it is masked out" if node["mask"] is False else ""


def _obstacle_of_mask(node: Any) -> str:
    fn = node["fn"]
    while isinstance(fn, Independent | ExpandedDistribution):
        fn = fn.base_dist
    masked = node["mask"] is not None or isinstance(fn, MaskedDistribution)
    return "some of it is masked, where it has no prior to measure from" if masked else ""


def _constrained(support: constraints.Constraint) -> str:
    return "it is positive" if is_positive(support) else f"it is constrained to {support}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _choose(
    sites: Iterable[str] | None,
    readable: Mapping[str, _Readable],
    missing: Collection[str],
    also: Collection[str],
    reasons: dict[str, str],
) -> list[str]:
    """Return the sites to reduce, and note why the others stay whole."""
    if sites is None:
        wanted = {name for name, found in readable.items() if found.support is constraints.real}
        wanted = (wanted - set(missing)) | (readable.keys() & set(also))
    else:
        wanted = set(choose_named(sites, readable, reasons))
    chosen: list[str] = []
    for name, found in reversed(list(readable.items())):
        children = [child for child in chosen if name in readable[child].parents]
        if name not in wanted:
            reasons[name] = _not_wanted(found, named=sites is not None)
        elif not children:
            chosen.append(name)
        elif sites is None:
            reasons[name] = f"the prior of {_listed(children)} {OTHER_LEVEL}"
        else:
            msg = (
                f"sites= names {name!r} and also {_listed(children)}, whose prior depends on it, "
                "so that their ΔF do not add up. Expected one or the other: reduce and refit one, "
                "then reduce the other"
            )
            raise ValueError(msg)
    return chosen[::-1]


OTHER_LEVEL = "depends on it; sites= may name it instead"


def _not_wanted(found: _Readable, *, named: bool) -> str:
    if named:
        return "it is not among sites="
    if found.support is constraints.real:
        return "it stands for missing observations; sites= may name it"
    return f"{_constrained(found.support)}; sites= may name it"


def _priors(
    runs: ModelRuns,
    factors: Sequence[Factor],
    chosen: Mapping[str, _Readable],
    reasons: dict[str, str],
) -> dict[str, Prior]:
    parents = {name: found.parents for name, found in chosen.items() if found.parents}
    measured = [name for name, found in chosen.items() if found.reading is None]
    expected, failures = expect_priors(
        runs, factors, {name: them for name, them in parents.items() if name not in measured}
    )
    divergences, unknown = read_divergences(
        runs, factors, {name: parents.get(name, ()) for name in measured}
    )
    reasons |= failures | unknown
    beside = {s.name: {t.name for t in factor.sites} for factor in factors for s in factor.sites}
    priors = {}
    for name, found in ((n, f) for n, f in chosen.items() if n not in reasons):
        reading = found.reading
        if reading is None:
            nowhere = torch.tensor(-torch.inf, dtype=torch.float64, device="cpu")
            priors[name] = Prior(nowhere, None, _MEASURED, divergences[name])
            continue
        exact = (Prior(reading.log_density, reading.gaussian), torch.zeros((), device="cpu"))
        prior, error = expected.get(name, exact)
        infinite = prior.log_density_at_zero.isinf()
        infinite = infinite & ~reading.masked.to(infinite.device)
        if infinite.numel() and infinite.all():
            reasons[name] = "its prior density at zero is infinite"
            continue
        correlated = beside[name].intersection(found.parents)
        priors[name] = Prior(
            prior.log_density_at_zero,
            prior.gaussian,
            _note(found.site, reading, infinite, error),
            joint=reading.joint,
            note_if_reduced=_note_expected(correlated),
        )
    return priors


_MEASURED = "set to zero; predicted to second order in each element"


def _note_expected(correlated: Collection[str]) -> str:
    """Say what moves as elements go that are correlated with it, and their prior with it."""
    if not correlated:
        return ""
    return f"ΔF averages the prior over {_listed(correlated)}: reduce in one call, not in two"


def _note(site: Site, reading: Reading, infinite: Tensor, error: Tensor) -> str:
    masked, unbounded = (
        int(t.count_nonzero()) * (site.shape.numel() // max(1, t.numel()))
        for t in (reading.masked, infinite)
    )
    largest = float(error.max()) if error.numel() else 0.0
    notes = [
        _describe_spike(site),
        "what is left keeps its marginal prior"
        if reading.joint is not None and site.rest == "marginal"
        else "",
        f"{masked} without a prior, kept" if masked else "",
        f"{unbounded} with an infinite prior density at zero, kept" if unbounded else "",
        f"prior at zero known to ±{largest:.2f} nats" if largest > 0.1 else "",
    ]
    return "; ".join(filter(None, notes))


def _describe_spike(site: Site) -> str:
    if site.center is None:
        return ""
    if site.center.at_mean.all():
        return "spike at the mean of its prior"
    points = site.constrain(torch.zeros((), device="cpu")).unique()
    return f"spike at {float(points):g}" if len(points) == 1 else ""


def _check_shape(node: Any, site: Site) -> None:
    shape = find_full_shape(node)
    if shape != site.shape:
        msg = (
            f"the site {site.name!r} has shape {tuple(site.shape)} in the guide and "
            f"{tuple(shape)} in the model. Expected the model that the guide was trained for, "
            "called with arguments of the same sizes; if a second guide took the parameters of a "
            "first one of the same name, call pyro.clear_param_store() between them"
        )
        raise ValueError(msg)
