"""What a reduction starts from: the posterior of a guide, and the prior of its sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_function, read_names, refuse
from pyro_bmr.arguments.columns import read_columns
from pyro_bmr.arguments.patterns import find_names
from pyro_bmr.display import a_or_an, warn
from pyro_bmr.factors.centering import recenter
from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.factors.joint import meet_priors
from pyro_bmr.guides.autoguides import take_from_store
from pyro_bmr.guides.parts import find_program
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.reading import read_guide, read_origin
from pyro_bmr.mathematics.reduced_priors import Laplace, ReducedPrior, Spike
from pyro_bmr.moments.factors import to_factors
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.priors.site_priors import check_named, choose_named, read_priors
from pyro_bmr.priors.spikes import (
    find_centers,
    find_correlated_positive,
    find_vanishing,
    set_rests,
)
from pyro_bmr.programs.pairs import check_guide
from pyro_bmr.programs.refusals import explained_refusals
from pyro_bmr.programs.streams import read_stream_or_data
from pyro_bmr.programs.wrapped import peel
from pyro_bmr.selection.groups import Grouping, gives_labels
from pyro_bmr.selection.scores import ElementScores, score


@dataclass(frozen=True)
class Problem:
    """A posterior, the priors of the sites that may be reduced, and why others may not.

    ``absent`` are the shapes of sites that the posterior does not hold. ``sites`` are those that
    the user named, as they were given; None stands for all.
    """

    factors: tuple[Factor, ...]
    origin: Origin
    priors: Mapping[str, Prior]
    reasons: Mapping[str, str]
    absent: Mapping[str, torch.Size]
    sites: tuple[str, ...] | None = None

    def without(self, reasons: Mapping[str, str]) -> Problem:
        """Leave sites whole, each for a reason."""
        priors = {name: prior for name, prior in self.priors.items() if name not in reasons}
        return replace(self, priors=priors, reasons={**self.reasons, **reasons})

    def choose(self, sites: Collection[str], option: str) -> Problem:
        """Leave all sites whole but those that the user named in ``option``."""
        check_named(sites, self.priors, self.reasons, option)
        return self.without(
            {name: f"it is not among {option}=" for name in self.priors if name not in sites}
        )

    def warn_if_empty(self) -> None:
        """Warn if no site is left."""
        if not self.priors:
            by_reason: dict[str, list[str]] = {}
            for name, reason in self.reasons.items():
                by_reason.setdefault(reason, []).append(name)
            listed = "; ".join(
                f"{_count_names(names)}: {reason}" for reason, names in by_reason.items()
            )
            warn(f"no site of this guide can be reduced ({listed})")


def read_problem(
    verb: str,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    model: Callable[..., Any] | None,
    sites: Iterable[str] | None,
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior],
    groupings: tuple[Grouping, ...] | None = None,
) -> Problem:
    """Read a guide, and the priors of the model that it was trained for.

    ``model``, ``args`` and ``kwargs`` take the place of what the guide remembers of its first call.
    Coordinates are measured from where the spike of ``reduced_prior`` is. Of a reduction, which
    measures F, positive sites that are named, or that one of ``groupings`` labels, can become zero.
    """
    _check_guide(verb, guide, args, kwargs)
    if isinstance(guide, Posterior) and model is None:
        return _read_moments(verb, guide, args or kwargs, sites, reduced_prior)
    if model is not None:
        check_function("model", model, "the Pyro model that the guide was trained for")
    named = read_names("sites", sites)
    data = read_stream_or_data(model or read_origin(guide).model, guide, args, kwargs)
    columns = read_columns((*args, *(kwargs or {}).values()))
    args, kwargs = data.args, data.kwargs
    if args or kwargs:
        guide = take_from_store(guide, args, kwargs)
    origin = read_origin(guide)
    if args or kwargs:
        origin = replace(origin, args=args, kwargs=kwargs, stream=data.stream)
        origin = replace(origin, columns=columns or origin.columns)
    if model is not None:
        origin = replace(origin, model=model)
    check_guide(origin.model, guide)
    program = peel(guide).program
    if origin.model is None and isfunction(program):
        msg = (
            f"a guide function such as {program.__name__} does not know its model. Expected the "
            f"model and how to call both: {verb}(guide, x, y, model=model)"
        )
        raise ValueError(msg)
    given = bool(args or kwargs)
    with explained_refusals(origin.model, guide, origin.args, origin.kwargs):
        return _read(verb, guide, origin, given, named, reduced_prior, groupings)


def _read_moments(
    verb: str,
    posterior: Posterior,
    data: Any,
    sites: Iterable[str] | None,
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior],
) -> Problem:
    """Read a posterior that comes with its prior."""
    if data or posterior.prior_spread is None:
        got = "got data with" if data else "got"
        msg = (
            f"{got} a Posterior without a program. Expected its prior_covariance= (or "
            f"prior_scale=) and no data, as in {verb}(posterior), or a Pyro model of the same "
            f"sites, as in "
            f"{verb}(posterior, model=model)"
        )
        raise ValueError(msg)
    factors, priors, reasons = to_factors(posterior, _read_rest(reduced_prior))
    named = read_names("sites", sites)
    if named is not None:
        choose_named(named, priors, reasons)
    absent = {name: posterior.layout.shapes[name] for name in reasons}
    return Problem(factors, Origin(moments=posterior), priors, reasons, absent, named)


def _read_rest(reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]) -> str:
    """Read what is left of a correlated prior, and refuse what has no place in a Posterior."""
    by_site = reduced_prior if isinstance(reduced_prior, Mapping) else {"": reduced_prior}
    every = by_site.values()
    spikes = [one for one in every if isinstance(one, Spike)]
    if any(isinstance(one, Laplace) for one in every) or not all(map(_is_at_zero, spikes)):
        expected = (
            "Spike() at zero or Gaussian(loc, scale) for a Posterior; where both of its means are "
            "less the prior mean, zero is the mean of the prior"
        )
        refuse("reduced_prior", reduced_prior, expected)
    rests = {one.rest for one in spikes} or {"conditional"}
    if len(rests) > 1:
        refuse("reduced_prior", reduced_prior, "one rest= for all sites of a Posterior")
    return rests.pop()


def _read(
    verb: str,
    guide: Any,
    origin: Origin,
    given: bool,
    named: tuple[str, ...] | None,
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior],
    groupings: tuple[Grouping, ...] | None,
) -> Problem:
    factors = read_guide(guide, origin)
    origin = replace(origin, program=find_program(guide, origin, factors))
    if origin.model is None:
        msg = (
            f"this {type(guide).__name__} does not know its model; copy.deepcopy and torch.save "
            "take it away from Pyro's autoguides, from the copy and from the original. Expected "
            f"the model: {verb}(guide, model=model)"
        )
        raise ValueError(msg)
    program = origin.model, origin.args, origin.kwargs
    factors = set_rests(recenter(factors, {}), reduced_prior)
    centers, failures = find_centers(*program, factors, reduced_prior)
    factors = recenter(factors, centers)
    also = reduced_prior if isinstance(reduced_prior, Mapping) else ()
    held = [site.name for factor in factors for site in factor.sites]
    meant = {one for name in named or () for one in find_names(name, held)}
    obstacles = {site.name: f.obstacle for f in factors for site in f.sites} | failures
    labelled = () if named or also else tuple(groupings or ())
    measured = {
        site.name: "" if groupings and given else _unmeasured(site.name, obstacles[site.name])
        for site in find_vanishing(factors, reduced_prior)
        if site.name in {*also, *meant} or any(gives_labels(g, site) for g in labelled)
    }
    for site in find_correlated_positive(factors, reduced_prior):
        if site.name in {*also, *meant}:
            measured[site.name] = _correlated(obstacles[site.name])
    read = read_priors(*program, factors, named, failures, {*also, *measured}, measured)
    _check_rests(factors, read[0], reduced_prior)
    return Problem(factors, origin, *read, named)


def _check_rests(
    factors: tuple[Factor, ...],
    priors: Mapping[str, Prior],
    reduced_prior: ReducedPrior | Mapping[str, ReducedPrior],
) -> None:
    """Refuse two meanings of what is left of one site."""
    by_site = reduced_prior if isinstance(reduced_prior, Mapping) else {}
    for site in (site for factor in factors for site in factor.sites if site.name in priors):
        one = by_site.get(site.name, reduced_prior)
        marginal = isinstance(one, Spike) and one.rest == "marginal"
        if priors[site.name].joint is not None and marginal and site.rest != "marginal":
            msg = (
                f"got Spike(rest='marginal') for the site {site.name!r}, of which some was pruned "
                "before with rest='conditional'. Expected the same as before"
            )
            raise ValueError(msg)


def read_spike(reduced_prior: Any) -> Spike:
    """Read a spike at zero, of any meaning of what is left."""
    if not isinstance(reduced_prior, Spike) or not _is_at_zero(reduced_prior):
        refuse("reduced_prior", reduced_prior, "Spike() at zero, or Spike(rest='marginal')")
    return reduced_prior


def _is_at_zero(spike: Spike) -> bool:
    return not isinstance(spike.loc, str) and not torch.as_tensor(spike.loc, device="cpu").any()


def read_scores(
    verb: str,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    model: Callable[..., Any] | None,
    sites: Iterable[str] | None,
    spike: Spike = Spike(),
) -> tuple[Problem, ElementScores]:
    """Read a guide as `read_problem` does, and score each of its elements for a spike."""
    problem = read_problem(verb, guide, args, kwargs, model, sites, spike)
    problem, _ = assign(problem, spike)
    problem.warn_if_empty()
    return problem, score(meet_priors(problem.factors, problem.priors))


def assign(
    problem: Problem, reduced_prior: ReducedPrior | Mapping[str, ReducedPrior]
) -> tuple[Problem, dict[str, ReducedPrior]]:
    """Give every site that may be reduced its reduced prior.

    A site that cannot take its own stays whole; that is a ``ValueError`` if the user named it.
    A site that is not in a mapping stays whole, too.
    """
    if isinstance(reduced_prior, Mapping):
        by_site = dict(reduced_prior)
        unfit = _unfit(problem, by_site)
        problem = problem.without(unfit).choose(by_site, "reduced_prior")
    else:
        unfit = _unfit(problem, dict.fromkeys(problem.priors, reduced_prior))
        problem = problem.without(unfit)
        if problem.sites is not None:
            chosen = choose_named(problem.sites, problem.priors, problem.reasons)
            problem = problem.choose(chosen, "sites")
        by_site = dict.fromkeys(problem.priors, reduced_prior)
    _check_shapes(problem, {name: by_site[name] for name in problem.priors})
    return problem, {name: by_site[name] for name in problem.priors}


def _count_names(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2:,} others"


def _correlated(why: str) -> str:
    return (
        f"{why or 'it is positive'}; this guide has it correlated with others, and F without it is "
        "measured only where its posterior is independent, as in AutoNormal"
    )


def _unmeasured(name: str, why: str) -> str:
    return f"{why}; with the data, reduce(guide, x, y, sites=[{name!r}]) measures F without it"


def _check_guide(
    verb: str, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> None:
    if not callable(guide) and hasattr(guide, "guide"):
        data = (", x, y" if args else "") + (", kwargs={...}" if kwargs else "")
        msg = f"got {a_or_an(guide)}. Pass its guide: {verb}(result.guide{data})"
        raise TypeError(msg)


def _check_shapes(problem: Problem, by_site: Mapping[str, ReducedPrior]) -> None:
    shapes = {site.name: site.shape for factor in problem.factors for site in factor.sites}
    for name, one in by_site.items():
        for what, value in vars(one).items():
            if not isinstance(value, Tensor) or name not in shapes:
                continue
            try:
                fits = torch.broadcast_shapes(value.shape, shapes[name]) == shapes[name]
            except RuntimeError:
                fits = False
            if not fits:
                msg = (
                    f"got a reduced prior whose {what} has the shape {tuple(value.shape)} for the "
                    f"site {name!r}. Expected a number, or a tensor that broadcasts to "
                    f"{tuple(shapes[name])}; a mapping gives each site its own"
                )
                raise ValueError(msg)


def _describe(prior: Prior) -> str:
    return "not Gaussian" if prior.joint is None else "correlated"


def _unfit(problem: Problem, by_site: Mapping[str, ReducedPrior]) -> dict[str, str]:
    return {
        name: f"its prior is {_describe(prior)}, and {type(by_site[name]).__name__}() needs one "
        "of independent Gaussians"
        for name, prior in problem.priors.items()
        if name in by_site and not isinstance(by_site[name], Spike) and prior.gaussian is None
    }
