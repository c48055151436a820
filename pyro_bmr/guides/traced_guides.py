"""Guides of no known family, read from what they do when they run.

A guide that runs tells at every sample statement from which distribution it draws. If that is a
Gaussian in unconstrained coordinates, with a mean that depends at most linearly on the sites
before it and a covariance that does not, then the posterior is Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_bmr.factors.factor import Factor, check_finite
from pyro_bmr.factors.gamma import GammaFactor
from pyro_bmr.guides.linear_gaussian import Conditional, join
from pyro_bmr.guides.pruned_guide import Origin
from pyro_bmr.guides.statements import NotGaussianError, Statement, read_statement
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.dry_run import check_owned, dry_run, find_modules

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
    A site may also be Gamma, independent of all others. Anything else is a `NotGaussianError` that
    says why; a guide that was never trained is a ValueError, one that does not run with these
    arguments a RuntimeError.

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

    def run(values: Mapping[str, Tensor]) -> _Reader:
        reader = _Reader(values, rows, frozenset(held), supports, full_rows)
        with reader:
            _call("guide", guide, origin)
        return reader

    with dry_run(guide, origin.model), left_alone(guide, origin.model):
        supports = {} if isinstance(guide, GuideMessenger) else _supports(origin)
        first = run({})
        for name, statement in first.statements.items():
            check_finite(name, "location", statement.loc)
        weights = {name: first.weights(name) for name in first.statements}
        generator = torch.Generator().manual_seed(0)
        for reach in (1.0, 3.0, 10.0):
            steps = {
                name: reach * s.step * torch.randn(s.step.shape, generator=generator).to(s.step)
                for name, s in first.statements.items()
            }
            moved = run({name: first.leaves[name].detach() + step for name, step in steps.items()})
            _check_linear(first, weights, moved, steps)
    return _factors(first.statements, weights)


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
        held: frozenset[str],
        supports: Mapping[str, constraints.Constraint],
        full_rows: _FullRows,
    ) -> None:
        super().__init__()
        self.values, self.rows, self.held = values, rows, held
        self.supports, self.full_rows = supports, full_rows
        self.statements: dict[str, Statement] = {}
        self.leaves: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.rows:
                msg["value"], msg["done"] = self.rows[name], True
            return
        if msg["is_observed"] or msg["infer"].get("is_auxiliary") or name in self.held:
            return
        own = find_support(msg["infer"].get("prior", msg["fn"]))
        statement = read_statement(msg, self.supports.get(name, own), self.full_rows)
        leaf = self.values.get(name, statement.loc).detach().clone().requires_grad_()
        self.statements[name], self.leaves[name] = statement, leaf
        msg["value"], msg["done"] = statement.site.constrain(leaf), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]

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


def _check_linear(
    first: _Reader,
    weights: Mapping[str, Mapping[str, Tensor]],
    moved: _Reader,
    steps: Mapping[str, Tensor],
) -> None:
    """Check what a guide does away from its mean against what was read there."""
    if first.statements.keys() != moved.statements.keys():
        sites = sorted(first.statements.keys() ^ moved.statements.keys())
        msg = (
            f"cannot reduce a guide that samples {sites} in some runs and not in others. Expected "
            "the same sites in every run"
        )
        raise NotGaussianError(msg)
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
        whence = " and ".join(map(repr, parents)) or "something that changes from run to run"
        what = "mean depends in a nonlinear way" if constant else "covariance depends"
        raise NotGaussianError(_refusal(name, f"its {what} on {whence}"))


def _factors(
    statements: Mapping[str, Statement], weights: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Factor, ...]:
    gaussians, gammas = [], []
    for name, s in statements.items():
        for parent in weights[name]:
            if s.posterior is None or statements[parent].posterior is None:
                why = f"it depends on {parent!r}, and one of the two is Gamma"
                raise NotGaussianError(_refusal(name, why))
            if s.site.shape != s.loc.shape:
                why = f"it depends on {parent!r} in a plate of which only some rows were drawn"
                raise NotGaussianError(_refusal(name, why))
        if s.posterior is None:
            gammas.append(GammaFactor(s.site, s.spread[0].detach(), s.loc.detach().exp()))
        else:
            detached = {n: w.detach() for n, w in weights[name].items()}
            gaussians.append(Conditional(s.site, s.posterior, detached))
    return (*join(gaussians), *gammas)


def _refusal(name: str, why: str) -> str:
    return (
        f"cannot reduce a guide whose posterior is not one Gaussian in unconstrained coordinates: "
        f"of the site {name!r}, {why}. Expected a mean that is linear in other sites and a "
        "covariance that is constant. Train a guide that has both, such as AutoStructured, "
        "AutoMultivariateNormal or AutoNormal"
    )


def _supports(origin: Origin) -> dict[str, constraints.Constraint]:
    if origin.model is None:
        return {}
    with poutine.block(), poutine.trace() as traced:
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
