"""Guides of no known family, read from what they do when they run.

A guide that runs tells at every sample statement from which distribution it draws. If that is a
Gaussian in unconstrained coordinates, with a mean that depends at most linearly on the sites
before it and a covariance that does not, then the posterior is Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._pytree import tree_map_only

from pyro_bmr.factors.factor import Factor, check_finite
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.factors.program import ProgramFactor
from pyro_bmr.guides.linear_gaussian import Conditional, join
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.statements import (
    NotGaussianError,
    PartialRowsError,
    Statement,
    read_statement,
    site_refusal,
)
from pyro_bmr.programs.distributions import find_core, find_element_support, find_support
from pyro_bmr.programs.dry_run import check_owned, dry_run, find_modules
from pyro_bmr.programs.given_values import PriorMessenger
from pyro_bmr.programs.pairs import MODEL_AS_GUIDE
from pyro_bmr.programs.site_kinds import is_data
from pyro_bmr.programs.sites import Site, is_scaled

_Failure = NotGaussianError | PartialRowsError
_FullRows = Callable[[str], tuple[Tensor, Tensor] | None]


def trace_factors(
    guide: Callable[..., Any],
    origin: Origin,
    *,
    held: Collection[str] = (),
    full_rows: _FullRows = lambda _: None,
) -> tuple[Factor, ...]:
    r"""Read the posterior of a guide by running it a few times, without touching it.

    .. math:: \theta_i \mid \theta_{<i} \sim
        N(\mu_i + \sum_{j<i} W_{ij} (\theta_j - \mu_j), L_i L_i^\top)

    in unconstrained coordinates. The weights :math:`W_{ij}` are gradients at the mean; that mean
    and covariance are such is checked at three other points, 1, 3 and 10 standard deviations away.
    A site may also be Gamma, independent of all others, or a Delta at the value of one auxiliary
    Gaussian in unconstrained coordinates, as autoguides draw it. Any other site, one that depends
    on the arguments and one that depends on such a site, is a `ProgramFactor`; if there are no
    others, a `NotGaussianError` says why. A guide that was never trained is a ValueError, one that
    does not run with these arguments a RuntimeError.

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

    def run(values: Mapping[str, Tensor], origin: Origin) -> _Reader:
        reader = _Reader(values, rows, sources, frozenset(held), supports, full_rows)
        with reader:
            _call("guide", guide, origin)
        return reader

    with dry_run(guide, origin.model), left_alone(guide, origin.model):
        supports = {} if isinstance(guide, GuideMessenger) else _supports(origin)
        leaves, followed = _follow_arguments(origin)
        try:
            first = run({}, followed)
        except RuntimeError:
            leaves, first = [], run({}, origin)
        if first.observes:
            raise TypeError(MODEL_AS_GUIDE)
        if sources:  # which are at their means only once they are known
            first = run({}, followed if leaves else origin)
        for name, statement in first.statements.items():
            check_finite(name, "location", statement.loc)
        given = _find_given(first, leaves, partial(run, {}), origin)
        why = "it depends on what the guide is given (amortised)"
        failures = {**first.unread, **{name: _refusal(name, why) for name in given}}
        weights = {name: first.weights(name) for name in first.statements}
        generator = torch.Generator().manual_seed(0)
        for reach in (1.0, 3.0, 10.0):
            steps = {
                name: reach * s.step * torch.randn(s.step.shape, generator=generator).to(s.step)
                for name, s in first.statements.items()
            }
            values = {name: first.leaves[name].detach() + step for name, step in steps.items()}
            failures = {**_nonlinear(first, weights, run(values, origin), steps), **failures}
        failures = {**_unfit(first.statements, weights), **failures}
        _spread_failures(failures, weights)
        left = {n: s for n, s in first.statements.items() if n not in failures}
        if failures and not left and not held:
            raise next(iter(failures.values()))
        drawn = tuple(
            _draw(guide, origin, {n: failures[n].why for n in first.order if n in failures})
        )
    return (*_factors(left, weights), *drawn)


def draw_alone(
    guide: Callable[..., Any], origin: Origin, reasons: Mapping[str, str]
) -> tuple[Factor, ...]:
    """Read some sites of a guide by nothing but draws, and leave all as it was."""
    if not reasons:
        return ()
    with dry_run(guide, origin.model), left_alone(guide, origin.model):
        return tuple(_draw(guide, origin, reasons))


def read_sources(guide: Callable[..., Any], origin: Origin) -> dict[str, str]:
    """Find the auxiliary sites whose values others are, in a `dry_run`; the other by the one."""
    supports = {} if isinstance(guide, GuideMessenger) else _supports(origin)
    reader = _Reader({}, {}, {}, frozenset(), supports, lambda _: None)
    with reader:
        _call("guide", guide, origin)
    return reader.sources


@contextmanager
def left_alone(guide: Any, model: Any) -> Iterator[None]:
    """Check that a guide has all its parameters, and put back what it changes of itself.

    It runs inside, in a `dry_run`; parameters that are made there are a ValueError.
    """
    roots = [*find_modules(guide), *find_modules(model)]
    modules = [module for root in find_modules(guide) for module in root.modules()]
    attributes = [dict(vars(module)) for module in modules]
    contents = [{k: dict(v) for k, v in a.items() if isinstance(v, dict)} for a in attributes]
    own = {id(p) for root in roots for p in root.parameters()}
    for root in find_modules(guide):
        if isinstance(root, PyroModule):
            for path, parameter in root.named_parameters():
                check_owned(".".join(filter(None, (root._pyro_name, path))), parameter)
    stored = set(pyro.get_param_store().keys())
    try:
        yield
        made = [
            name
            for name, p in pyro.get_param_store().named_parameters()
            if name not in stored and id(p) not in own
        ]
        made += [n for root in roots for n, p in root.named_parameters() if id(p) not in own]
    finally:
        for module, before, inside in zip(modules, attributes, contents, strict=True):
            for key, content in inside.items():
                before[key].clear()
                before[key].update(content)
            vars(module).clear()
            vars(module).update(before)
    if made:
        msg = (
            f"the guide has no parameters {sorted(set(made))} before it runs: it was never called, "
            "or Pyro's param store was cleared since. Expected a trained guide: train it by SVI, "
            "or load the param store"
        )
        raise ValueError(msg)


class _Reader(Messenger):
    """Put latent sites at given values, or else at their means, and read their statements."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        rows: dict[str, Tensor],
        sources: dict[str, str],
        held: frozenset[str],
        supports: Mapping[str, constraints.Constraint],
        full_rows: _FullRows,
    ) -> None:
        super().__init__()
        self.values, self.rows, self.sources, self.held = values, rows, sources, held
        self.supports, self.full_rows = supports, full_rows
        self.statements: dict[str, Statement] = {}
        self.leaves: dict[str, Tensor] = {}
        self.unread: dict[str, _Failure] = {}
        self.order: list[str] = []
        self.auxiliary: dict[str, Statement | None] = {}
        self.in_messenger = self.observes = False

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.rows:
                msg["value"], msg["done"] = self.rows[name], True
            return
        if msg["is_observed"]:
            self.observes |= is_data(msg) and not self.in_messenger
            return
        if msg["infer"].get("is_auxiliary"):
            self._put_at_mean(msg)
            return
        if name in self.held:
            return
        self.order.append(name)
        self.in_messenger |= "prior" in msg["infer"]
        if is_scaled(msg) or msg["mask"] is not None:
            self.unread[name] = site_refusal(name, "it is scaled or masked there")
            return
        own = find_support(msg["infer"].get("prior", msg["fn"]))
        support = self.supports.get(name, own)
        try:
            if isinstance(find_core(msg["fn"]), dist.Delta) and self._read_source(msg, support):
                return
            statement = read_statement(msg, support, self.full_rows)
        except (NotGaussianError, PartialRowsError) as error:
            self.unread[name] = error
            return
        leaf = self.values.get(name, statement.loc).detach().clone().requires_grad_()
        self.statements[name], self.leaves[name] = statement, leaf
        msg["value"], msg["done"] = statement.site.constrain(leaf), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]
        elif msg["name"] in self.auxiliary:
            leaf = msg["value"].detach().clone().requires_grad_()
            self.leaves[msg["name"]] = msg["value"] = leaf

    def _put_at_mean(self, msg: Any) -> None:
        """Read an auxiliary statement; it is drawn at random unless it is known as a source."""
        name, core = msg["name"], find_core(msg["fn"])
        if isinstance(core, dist.Delta) or not core.has_rsample:
            return
        try:
            statement = read_statement(msg, constraints.real, self.full_rows)
        except (NotGaussianError, ValueError):
            statement = None
        self.auxiliary[name] = statement
        if statement is not None and name in self.sources:
            value = self.values.get(self.sources[name], statement.loc)
            msg["value"], msg["done"] = value.detach(), True

    def _read_source(self, msg: Any, support: constraints.Constraint) -> bool:
        """Read a Delta at the value of an auxiliary site, as autoguides have them."""
        name, value = msg["name"], find_core(msg["fn"]).v
        sources = [n for n in self.auxiliary if _depends(value, self.leaves[n])]
        if not sources:
            return False
        leaf, statement = self.leaves[sources[0]], self.auxiliary[sources[0]]
        unshared = len(sources) == 1 and self.sources.get(sources[0], name) == name
        if unshared and statement is not None:
            site = replace(statement.site, name=name, support=support)
            whole = site.constrain(leaf)
            if whole.shape == value.shape and torch.allclose(whole, value, rtol=1e-4):
                self.statements[name] = replace(statement, site=site)
                self.leaves[name], self.sources[sources[0]] = leaf, name
                return True
        refusal = self.unread[name] = site_refusal(name, _THROUGH.format(sources))
        # Sites that share a source are not independent of each other.
        for other in {self.sources[source] for source in sources if source in self.sources}:
            self.unread.setdefault(other, site_refusal(other, _SHARED.format(name)))
        raise refusal

    def parents(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the sites before one that a tensor depends on, by its gradients."""
        names = list(self.statements)
        before = {n: self.leaves[n] for n in names[: names.index(name)]}
        if not before or not tensor.requires_grad:
            return {}
        gradients = torch.autograd.grad(
            tensor.sum(), [*before.values()], allow_unused=True, retain_graph=True
        )
        return {
            n: leaf
            for (n, leaf), gradient in zip(before.items(), gradients, strict=True)
            if gradient is not None
        }

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the Jacobian of a site's mean by the sites before it."""
        loc = self.statements[name].loc
        parents = self.parents(name, loc)
        if not parents:
            return {}
        rows = [
            torch.autograd.grad(element, [*parents.values()], retain_graph=True)
            for element in loc.reshape(-1)
        ]
        jacobians = {
            parent: torch.stack([row[i].reshape(-1) for row in rows])
            for i, parent in enumerate(parents)
        }
        return {parent: jacobian for parent, jacobian in jacobians.items() if jacobian.any()}


_SHARED = "it is the value of an auxiliary site, from which {!r} is computed, too"
_THROUGH = (
    "it is computed from the auxiliary sites {}, and is not one of them, element by element and "
    "alone; if an autoguide inside of this guide draws them, pass that one"
)


def _depends(value: Tensor, leaf: Tensor) -> bool:
    if not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, retain_graph=True)
    return gradient is not None


def _nonlinear(
    first: _Reader,
    weights: Mapping[str, Mapping[str, Tensor]],
    moved: _Reader,
    steps: Mapping[str, Tensor],
) -> dict[str, _Failure]:
    """Find sites that do away from the mean what was not read there."""
    if first.statements.keys() != moved.statements.keys():
        sites = sorted(first.statements.keys() ^ moved.statements.keys())
        msg = (
            f"cannot reduce a guide that samples {sites} in some runs and not in others. Expected "
            "the same sites in every run"
        )
        raise NotGaussianError(msg)
    failures: dict[str, _Failure] = {}
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


def _other(reader: _Reader, name: str) -> str:
    """Say what it may be that a site depends on, if no site that was read."""
    before = reader.order[: reader.order.index(name)]
    unread = [n for n in before if n in reader.unread]
    return " or ".join(map(repr, unread)) or "something that changes from run to run"


def _follow_arguments(origin: Origin) -> tuple[list[Tensor], Origin]:
    """Copy the arguments, so that gradients lead to them."""
    leaves: list[Tensor] = []

    def follow(value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.requires_grad:
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map_only(Tensor, follow, (origin.args, dict(origin.kwargs)))
    return leaves, replace(origin, args=args, kwargs=kwargs)


def _turn_over(origin: Origin) -> Origin:
    """Put the rows of whole numbers, to which no gradient leads, in another order."""

    def turn(value: Tensor) -> Tensor:
        return value if value.is_floating_point() or not value.dim() else value.flip(0)

    args, kwargs = tree_map_only(Tensor, turn, (origin.args, dict(origin.kwargs)))
    return replace(origin, args=args, kwargs=kwargs)


def _find_given(
    first: _Reader, leaves: list[Tensor], run: Callable[[Origin], _Reader], origin: Origin
) -> set[str]:
    """Find sites whose posterior is computed from the arguments of the guide."""
    found = {
        name
        for name, statement in first.statements.items()
        if _leads_to(leaves, (statement.loc, *statement.spread))
    }
    changed = _find_changed(first, run(_turn_over(origin)))
    # What changes from run to run says nothing of the arguments.
    return found | (changed - _find_changed(first, run(origin)) if changed else changed)


def _find_changed(first: _Reader, other: _Reader) -> set[str]:
    changed = set()
    for name, statement in first.statements.items():
        both = zip(*((s.loc, *s.spread) for s in (statement, other.statements[name])), strict=True)
        if not all(torch.equal(one, two) for one, two in both):
            changed.add(name)
    return changed


def _leads_to(leaves: list[Tensor], tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether any of some tensors was computed from any of the leaves."""
    tensors = tuple(tensor for tensor in tensors if tensor.requires_grad)
    if not leaves or not tensors:
        return False
    total = torch.stack([tensor.sum() for tensor in tensors]).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return any(one is not None for one in found)


def _unfit(
    statements: Mapping[str, Statement], weights: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, _Failure]:
    """Find sites that depend on others in a way that cannot be put into one Gaussian."""
    failures: dict[str, _Failure] = {}
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
    failures: dict[str, _Failure], weights: Mapping[str, Mapping[str, Tensor]]
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
    guide: Callable[..., Any], origin: Origin, reasons: Mapping[str, str]
) -> Iterator[ProgramFactor]:
    """Draw sites that are not read, in a `dry_run`; one that is discrete or in part is left out."""
    supports = {} if isinstance(guide, GuideMessenger) else _supports(origin)
    pyro.set_rng_seed(0)
    draws: dict[str, list[Tensor]] = {name: [] for name in reasons}
    sites: dict[str, Site] = {}
    for _ in range(_DRAWS if reasons else 0):
        with poutine.block(), poutine.trace() as traced:
            _call("guide", guide, origin)
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


def _supports(origin: Origin) -> dict[str, constraints.Constraint]:
    if origin.model is None:
        return {}
    drawn = PriorMessenger(*origin.args, **origin.kwargs)
    with poutine.block(), drawn, poutine.trace() as traced:
        _call("model", origin.model, origin)
    latent = prune_subsample_sites(traced.trace).iter_stochastic_nodes()
    return {name: find_support(node["fn"]) for name, node in latent}


def _call(what: str, program: Callable[..., Any], origin: Origin) -> None:
    try:
        program(*origin.args, **origin.kwargs)
    except NotGaussianError:
        raise
    except Exception as error:
        msg = (
            f"the {what} could not be run to read the posterior ({type(error).__name__}: {error}). "
            "Expected it to run with the arguments given; pass those of the model, as when it was "
            "trained, on the device of the guide"
        )
        raise RuntimeError(msg) from error
