"""Guides of no known family, read from what they do when they run.

A guide that runs tells at every sample statement from which distribution it draws. If that is a
Gaussian in unconstrained coordinates, with a mean that depends at most linearly on the sites
before it and a covariance that does not, then the posterior is Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from pyro_bmr.factors.factor import Factor, check_finite
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.amortised import find_given
from pyro_bmr.guides.guide_reader import (
    Failure,
    FullRows,
    GuideReader,
    call_program,
    find_supports,
    left_alone,
)
from pyro_bmr.guides.linear_gaussian import Conditional, join
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.statements import NotGaussianError, Statement
from pyro_bmr.programs.distributions import find_element_support, find_support
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.pairs import MODEL_AS_GUIDE
from pyro_bmr.programs.sites import Site


def trace_factors(
    guide: Callable[..., Any],
    origin: Origin,
    *,
    held: Collection[str] = (),
    full_rows: FullRows = lambda _: None,
) -> tuple[Factor, ...]:
    r"""Read the posterior of a guide by running it a few times, without touching it.

    .. math:: \theta_i \mid \theta_{<i} \sim
        N(\mu_i + \sum_{j<i} W_{ij} (\theta_j - \mu_j), L_i L_i^\top)

    in unconstrained coordinates. The weights :math:`W_{ij}` are gradients at the mean; that mean
    and covariance are such is checked at three other points, 1, 3 and 10 standard deviations away.
    A site may also be Gamma, independent of all others, or a Delta at the value of one auxiliary
    Gaussian in unconstrained coordinates, as autoguides draw it. Any other site, one that depends
    on the arguments and one that depends on such a site, is a `ProgramFactor`; if there are no
    others, a `NotGaussianError` says why. A guide that was never trained is a ValueError.

    Sites in ``held`` are left out; ``full_rows`` maps a site in a sub-sampling plate to its mean
    and standard deviation at full size.

    >>> import pyro.distributions as dist
    >>> def guide():
    ...     a = pyro.sample("a", dist.Normal(torch.ones(()), 1.0))
    ...     pyro.sample("b", dist.Normal(2 * a, 1.0))
    >>> trace_factors(guide, Origin())[0].posterior.covariance
    tensor([[1., 2.],
            [2., 5.]])
    """
    rows: dict[str, Tensor] = {}
    sources: dict[str, str] = {}

    def run(values: Mapping[str, Tensor], origin: Origin) -> GuideReader:
        reader = GuideReader(values, rows, sources, frozenset(held), supports, full_rows)
        with reader:
            call_program("guide", guide, origin)
        return reader

    with dry_run(guide, origin.model), left_alone(guide, origin.model):
        supports = find_supports(guide, origin)
        first = run({}, origin)
        if first.observes:
            raise TypeError(MODEL_AS_GUIDE)
        if sources:  # which are at their means only once they are known
            first = run({}, origin)
        for name, statement in first.statements.items():
            check_finite(name, "location", statement.loc)
        given = find_given(first, run, origin)
        why = "it depends on what the guide is given (amortised)"
        failures = {**first.unread, **{name: _refusal(name, why) for name in given}}
        for name, factor in first.find_in_factors().items():
            failures[name] = _refusal(name, f"the factor {factor!r} of the guide depends on it")
        weights = {name: first.weights(name) for name in first.statements}
        generator = torch.Generator(device="cpu").manual_seed(0)
        for reach in (1.0, 3.0, 10.0):
            steps = {}
            for name, s in first.statements.items():
                noise = torch.randn(s.step.shape, generator=generator, device="cpu")
                steps[name] = reach * s.step * noise.to(s.step)
            values = {name: first.leaves[name].detach() + step for name, step in steps.items()}
            failures = {**_nonlinear(first, weights, run(values, origin), steps), **failures}
        failures = {**_unfit(first.statements, weights), **failures}
        _spread_failures(failures, weights)
        left = {n: s for n, s in first.statements.items() if n not in failures}
        if failures and not left and not held:
            raise next(iter(failures.values()))
        reasons = {name: failures[name].why for name in first.order if name in failures}
        drawn = tuple(_draw(guide, origin, reasons, supports))
    return (*_factors(left, weights), *drawn)


def draw_alone(
    guide: Callable[..., Any], origin: Origin, reasons: Mapping[str, str]
) -> tuple[Factor, ...]:
    """Read some sites of a guide by nothing but draws, and leave all as it was."""
    if not reasons:
        return ()
    with dry_run(guide, origin.model), left_alone(guide, origin.model):
        return tuple(_draw(guide, origin, reasons, find_supports(guide, origin)))


def _nonlinear(
    first: GuideReader,
    weights: Mapping[str, Mapping[str, Tensor]],
    moved: GuideReader,
    steps: Mapping[str, Tensor],
) -> dict[str, Failure]:
    """Find sites that do away from the mean what was not read there."""
    if first.statements.keys() != moved.statements.keys():
        sites = sorted(first.statements.keys() ^ moved.statements.keys())
        msg = (
            f"cannot reduce a guide that samples {sites} in some runs and not in others. Expected "
            "the same sites in every run"
        )
        raise NotGaussianError(msg)
    failures: dict[str, Failure] = {}
    for name, s in first.statements.items():
        now = moved.statements[name]
        shift = torch.zeros_like(s.loc).reshape(-1)
        for parent, weight in weights[name].items():
            shift = shift + weight @ steps[parent].reshape(-1)
        shift = shift.reshape(s.loc.shape)
        allowed = 1e-3 * s.step + 1e-4 * shift.abs() + 1e-5 * now.loc.abs()
        linear = ((now.loc - s.loc - shift).abs() <= allowed).all()
        constant = all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-4)
            for a, b in zip(s.spread, now.spread, strict=True)
        )
        if linear and constant:
            continue
        tensors = (now.loc,) if constant else now.spread
        parents = sorted({n for t in tensors for n in moved.parents(name, t)})
        whence = " and ".join(map(repr, parents)) or _other(first, name)
        what = "mean depends in a nonlinear way" if constant else "covariance depends"
        failures[name] = _refusal(name, f"its {what} on {whence}")
    return failures


def _other(reader: GuideReader, name: str) -> str:
    """Say what it may be that a site depends on, if no site that was read."""
    before = reader.order[: reader.order.index(name)]
    unread = [n for n in before if n in reader.unread]
    return " or ".join(map(repr, unread)) or "something that changes from run to run"


def _unfit(
    statements: Mapping[str, Statement], weights: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Failure]:
    """Find sites that depend on others in a way that cannot be put into one Gaussian."""
    failures: dict[str, Failure] = {}
    for name, s in statements.items():
        for parent in weights[name]:
            if s.posterior is None or statements[parent].posterior is None:
                why = f"it depends on {parent!r}, and one of the two is Gamma"
                failures[name] = _refusal(name, why)
            elif s.site.shape != s.loc.shape:
                why = f"it depends on {parent!r} in a plate of which only some rows were drawn"
                failures[name] = _refusal(name, why)
    return failures


def _spread_failures(
    failures: dict[str, Failure], weights: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Add what depends on sites that were not read; a site comes after those it depends on."""
    for name, parents in weights.items():
        unread = [parent for parent in parents if parent in failures]
        if unread and name not in failures:
            failures[name] = _refusal(name, f"it depends on {unread[0]!r}, which is not read")


def _factors(
    statements: Mapping[str, Statement], weights: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Factor, ...]:
    gaussians, gammas = [], []
    for name, s in statements.items():
        if s.posterior is None:
            gammas.append(GammaFactor(s.site, s.spread[0].detach(), s.loc.detach().exp()))
        else:
            detached = {n: w.detach() for n, w in weights[name].items()}
            gaussians.append(Conditional(s.site, s.posterior, detached))
    return (*join(gaussians), *gammas)


def _draw(
    guide: Callable[..., Any],
    origin: Origin,
    reasons: Mapping[str, str],
    supports: Mapping[str, constraints.Constraint],
) -> Iterator[ProgramFactor]:
    """Draw sites that are not read, in a `dry_run`; one that is discrete or in part is left out."""
    pyro.set_rng_seed(0)
    draws: dict[str, list[Tensor]] = {name: [] for name in reasons}
    sites: dict[str, Site] = {}
    for _ in range(_DRAWS if reasons else 0):
        with poutine.block(), poutine.trace() as traced:
            call_program("guide", guide, origin)
        for name in list(draws):
            node = traced.trace.nodes[name]
            support = supports.get(name, find_support(node["infer"].get("prior", node["fn"])))
            frames = tuple(f for f in node["cond_indep_stack"] if f.vectorized)
            partial = any(f.full_size not in (None, f.size) for f in frames)
            if partial or support.is_discrete:
                del draws[name]
                continue
            value = node["value"].detach()
            free = biject_to(find_element_support(support)).inv(value)
            event_dim = node["fn"].event_dim + free.dim() - value.dim()
            sites[name] = Site(name, free.shape, event_dim, support, frames)
            draws[name].append(free)
        # A point estimate is the same each time.
        if all(len(found) > 1 and torch.equal(*found[-2:]) for found in draws.values()):
            break
    for name, values in draws.items():
        yield ProgramFactor(sites[name], torch.stack(values), reasons[name])


# Enough for the expectation of a prior that depends on such a site.
_DRAWS = 64


def _refusal(name: str, why: str) -> NotGaussianError:
    msg = (
        f"cannot reduce a guide whose posterior is not one Gaussian in unconstrained coordinates: "
        f"of the site {name!r}, {why}. Expected a mean that is linear in other sites and a "
        "covariance that is constant. Train a guide that has both, such as AutoStructured, "
        "AutoMultivariateNormal or AutoNormal"
    )
    return NotGaussianError(msg, f"left to the guide: {why}")
