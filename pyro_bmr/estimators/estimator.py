r"""What all estimators of the free energy share.

The divergence from the prior is taken in closed form where there is one, and noise levels are
averaged out; how the expectation over the weights is taken is left to
`pyro_bmr.estimators.elbos`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.constraints import Constraint

from pyro_bmr.estimators.noise import NoiseLevel, find_noise, plug_in
from pyro_bmr.estimators.posteriors import SitePosterior, read_posteriors

# From where the rules are, so that they are known.
from pyro_bmr.estimators.propagation import GaussianTensor
from pyro_bmr.programs.distributions import find_support
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.enumeration import (
    Enumeration,
    SummedSites,
    find_enumerated,
    find_mixtures,
    refuse_by_name,
    sample_statements,
)
from pyro_bmr.programs.given_values import ValueMessenger
from pyro_bmr.programs.scales import read_scale
from pyro_bmr.programs.site_kinds import check_data_shapes, is_likelihood


class Estimator(ELBO, ABC):
    r"""The free energy of a model and a guide, in nats.

    .. math:: F = -E_q[\ln p(y \mid \theta)] + KL(q \,\|\, p)

    A loss like `pyro.infer.Trace_ELBO`, for reparameterised guides. Discrete sites that the model
    marks by ``infer={"enumerate": "parallel"}``, and that the guide does not sample, are summed
    out, as by `pyro.infer.TraceEnum_ELBO`. At its first call it runs the model a few times more,
    which leaves no trace, to learn its structure; that must not change. A latent site whose
    posterior it cannot use is a ValueError.
    """

    _plan: Plan | None = None

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the free energy, a scalar in nats, to differentiate it."""
        particles = [
            self.differentiable_terms(model, guide, *args, **kwargs)
            for _ in range(self.num_particles)
        ]
        return torch.stack([complexity - accuracy for complexity, accuracy in particles]).mean()

    def differentiable_terms(
        self, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Estimate complexity and accuracy from one draw, in nats; F is their difference."""
        plan = self._plan_for(model, guide, args, kwargs)
        return self._terms(plan, *self._get_trace(model, guide, args, kwargs))

    def split_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> tuple[float, float]:
        """Estimate both as numbers."""
        with torch.no_grad():
            terms = self.differentiable_terms(model, guide, *args, **kwargs)
        return float(terms[0]), float(terms[1])

    def learn(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> None:
        """Learn the structure of model and guide, as the first call does."""
        self._plan_for(model, guide, args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the free energy."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        warn_if_nan(loss, "loss")
        return loss.item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the free energy and add its gradients to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss.item()

    @abstractmethod
    def _values(self, plan: Plan, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        """By site, what the model is run with in place of the guide's draw."""

    def _log_likelihood(self, fn: Any, value: Tensor) -> Tensor:
        return fn.log_prob(value)

    @abstractmethod
    def _refine(self, plan: Plan, run: Run, posteriors: Mapping[str, SitePosterior]) -> Plan:
        """Check that the sites suit the estimator, or leave out those that do not."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        plan = self._plan_for(model, guide, args, kwargs)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        posteriors = read_posteriors(guide_trace, plan.supports)
        values = dict(self._values(plan, {name: posteriors[name] for name in plan.analytic}))
        for name, level in plan.noise.items():
            values[name], _ = plug_in(posteriors[name].fn, level.exponent)
        return _run(plan.enumeration(model), guide_trace, values, args, kwargs), guide_trace

    def _terms(self, plan: Plan, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        """Return complexity and accuracy."""
        posteriors = read_posteriors(guide_trace, plan.supports)
        offsets = {
            observed: -level.exponent * plug_in(posteriors[name].fn, level.exponent)[1]
            for name, level in plan.noise.items()
            for observed in level.observed
        }
        # What is not closed is estimated from the guide's draws, all statements of the guide
        # against all priors, since several sites may share a statement.
        complexity, accuracy = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        closed: set[str] = set()
        mixed: set[str] = set()
        for mixture in find_mixtures(model_trace, plan.enumeration):
            prior, likelihood = mixture.sum_out()
            complexity, accuracy = complexity - prior, accuracy + likelihood
            mixed.update(mixture.terms)
        for name, node in sample_statements(model_trace):
            if name in mixed:
                continue
            if node["is_observed"]:
                density = self._log_likelihood(node["fn"], node["value"])
                if name in offsets:
                    density = density + _spread(node["fn"], offsets[name])
                accuracy = accuracy + _total(node, density)
            elif name in plan.closed:
                posterior = posteriors[name]
                divergence = kl_divergence(posterior.fn, node["fn"])
                if isinstance(divergence, GaussianTensor):
                    msg = (
                        f"the prior of the site {name!r} depends on another site, and its moments "
                        "do not go on from there. Expected fixed priors; use the estimator 'local' "
                        "or 'global'"
                    )
                    raise ValueError(msg)
                complexity = complexity + _total(posterior.nodes[0], divergence)
                closed.update(statement["name"] for statement in posterior.nodes)
            else:
                draw = posteriors[name].draw
                complexity = complexity - _total(node, node["fn"].log_prob(draw))
        for name, node in sample_statements(guide_trace):
            if name not in closed:
                complexity = complexity + _total(node, node["fn"].log_prob(node["value"]))
        return complexity, accuracy

    def _plan_for(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Plan:
        if self._plan is None or (self._plan.model, self._plan.guide) != (model, guide):
            self._plan = self._make_plan(model, guide, args, kwargs)
        return self._plan

    def _make_plan(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Plan:
        guide_trace = poutine.block(poutine.trace(guide).get_trace)(*args, **kwargs)

        validate = is_validation_enabled()
        with poutine.block(), dry_run(model), torch.no_grad():
            model_trace = _run(model, guide_trace, {}, args, kwargs)
            if validate:
                model_trace.compute_log_prob()
                for _, site in sample_statements(model_trace):
                    check_site_shape(site, self.max_plate_nesting)
            check_data_shapes(model_trace.nodes)
            enumeration = find_enumerated(model_trace, guide_trace.nodes)
            latent = {
                name: site
                for name, site in sample_statements(model_trace)
                if not (site["is_observed"] or name in enumeration.sites)
            }
            _check_sites(guide_trace, latent)
            supports = {name: find_support(site["fn"]) for name, site in latent.items()}
            posteriors = read_posteriors(guide_trace, supports)
            rows = frozenset(_rows(model_trace))

            def run(values: Mapping[str, Any]) -> Trace:
                return _run(enumeration(model), guide_trace, values, args, kwargs)

            mixtures = _find_mixtures(run, enumeration)
            mixed = {name for mixture in mixtures for name in mixture.terms}
            noise = find_noise(run, posteriors)
            apart = all(mixture.keeps_rows_apart(rows) for mixture in mixtures)
            normal = frozenset(n for n, x in posteriors.items() if x.normal is not None) - mixed
            plan = Plan(
                model,
                guide,
                supports,
                {name: level for name, level in noise.items() if mixed.isdisjoint(level.observed)},
                frozenset(n for n, s in latent.items() if _is_closed(posteriors[n], s)) - mixed,
                normal if apart else frozenset(),
                rows,
                enumeration,
            )
            return self._refine(plan, run, posteriors)


Run = Callable[[Mapping[str, Any]], Trace]
"""Runs the model with the guide's draws, except for the values that it is given."""


@dataclass(frozen=True)
class Plan:
    """What an estimator learned of a model and a guide before its first step.

    ``closed`` sites have a closed divergence from the prior. ``analytic`` ones have independent
    normal elements, of which the expectation is taken; a row takes those of them in ``repeated``
    more than once. ``rows`` are possible numbers of observations; ``enumeration`` has the sites
    that are summed out, with which nothing is analytic unless rows are independent given θ.
    """

    model: Any
    guide: Any
    supports: Mapping[str, Constraint]
    noise: Mapping[str, NoiseLevel]
    closed: frozenset[str]
    analytic: frozenset[str]
    rows: frozenset[int]
    enumeration: Enumeration
    repeated: frozenset[str] = frozenset()


def _run(model: Any, guide_trace: Trace, values: Any, args: Any, kwargs: Any) -> Trace:
    with ValueMessenger(values):
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def _find_mixtures(run: Run, enumeration: Enumeration) -> list[SummedSites]:
    """Find what is summed out, which must be such as can be."""
    with refuse_by_name(enumeration):
        mixtures = find_mixtures(run({}), enumeration) if enumeration.sites else []
        for mixture in mixtures:
            mixture.sum_out()
    return mixtures


def _total(node: Any, density: Tensor) -> Tensor:
    return scale_and_mask(density, node["scale"], node["mask"]).sum()


def _is_closed(posterior: SitePosterior, prior: Any) -> bool:
    statement = posterior.nodes[0]
    if posterior.fn is None or statement["mask"] is not None or prior["mask"] is not None:
        return False
    scales = map(read_scale, (statement, prior))
    try:
        return torch.equal(*scales) and kl_divergence(posterior.fn, prior["fn"]) is not None
    except NotImplementedError:
        return False


def _rows(trace: Trace) -> Iterator[int]:
    """Yield what may be the number of observations."""
    for _, node in sample_statements(trace):
        if is_likelihood(node):
            sizes = [f.size for f in node["cond_indep_stack"] if f.vectorized]
            yield from sizes or node["fn"].shape()[:1]


def _spread(fn: Any, offset: Tensor) -> Tensor:
    """Sum what every element of a distribution adds to its log density, inside its wrappers."""
    if isinstance(fn, Independent):
        return sum_rightmost(_spread(fn.base_dist, offset), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return torch.where(fn._mask, _spread(fn.base_dist, offset), 0)
    return offset.expand(fn.batch_shape)


def _check_sites(guide_trace: Trace, latent: Mapping[str, Any]) -> None:
    missing = sorted(latent.keys() - guide_trace.nodes.keys())
    if missing:
        msg = (
            f"the guide does not sample {missing}. Expected a guide for all latent sites of the "
            "model, and all data that it observes as arguments; condition the model on those that "
            'shall be fixed, and mark discrete ones that shall be summed out by infer={"enumerate":'
            ' "parallel"}, or by pyro.infer.config_enumerate(model)'
        )
        raise ValueError(msg)
    for name, node in sample_statements(guide_trace):
        if not node["fn"].has_rsample:
            msg = (
                f"the guide's {type(node['fn']).__name__} of the site {name!r} has no "
                "reparameterised draws. Expected a continuous posterior; marginalise discrete "
                "sites, or use pyro.infer.Trace_ELBO"
            )
            raise ValueError(msg)
