r"""Estimators of the free energy, for `pyro.infer.SVI` and for `fit`.

They differ in how they take the expectation of the log likelihood over the weights. All of them
take the divergence from the prior in closed form where there is one, and average over noise levels.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence
from torch.distributions.constraints import Constraint

from pyro_bmr.dry_run import dry_run
from pyro_bmr.local_reparameterization import local_weights
from pyro_bmr.moments import GaussianTensor, expected_log_prob, gaussian
from pyro_bmr.noise import NoiseLevel, ValueMessenger, find_noise, plug_in
from pyro_bmr.posteriors import SitePosterior, read_posteriors


class Estimator(ELBO, ABC):
    r"""The free energy of a model and a guide, in nats.

    .. math:: F = -E_q[\ln p(y \mid \theta)] + KL(q \,\|\, p)

    A loss like `pyro.infer.Trace_ELBO`, for reparameterised guides. At its first call it runs the
    model a few times more, which leaves no trace, to learn its structure; that must not change.
    """

    _plan: _Plan | None = None

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the free energy, to differentiate it.

        Parameters
        ----------
        model, guide : callable
            A pair.
        *args, **kwargs
            Of both.

        Returns
        -------
        Tensor
            A number, in nats.

        Raises
        ------
        ValueError
            If a latent site has no posterior that this estimator can use.
        """
        plan = self._plan_for(model, guide, args, kwargs)
        particles = [
            self._particle(plan, *self._get_trace(model, guide, args, kwargs))
            for _ in range(self.num_particles)
        ]
        return torch.stack(particles).mean()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the free energy.

        Parameters
        ----------
        model, guide : callable
            A pair.
        *args, **kwargs
            Of both.

        Returns
        -------
        float
            In nats.
        """
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        warn_if_nan(loss, "loss")
        return loss.item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Estimate the free energy and add its gradients to the parameters.

        Parameters
        ----------
        model, guide : callable
            A pair.
        *args, **kwargs
            Of both.

        Returns
        -------
        float
            In nats.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        warn_if_nan(loss, "loss")
        return loss.item()

    @abstractmethod
    def _values(self, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        """By site, what the model is run with in place of the guide's draw."""

    def _log_likelihood(self, fn: Any, value: Tensor) -> Tensor:
        return fn.log_prob(value)

    def _refine(self, plan: _Plan, run: _Run, posteriors: Mapping[str, SitePosterior]) -> _Plan:  # noqa: ARG002
        return plan

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        plan = self._plan_for(model, guide, args, kwargs)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        posteriors = read_posteriors(guide_trace, plan.supports)
        values = dict(self._values({name: posteriors[name] for name in plan.analytic}))
        for name, level in plan.noise.items():
            values[name], _ = plug_in(posteriors[name].fn, level.exponent)
        return _run(model, guide_trace, values, args, kwargs), guide_trace

    def _particle(self, plan: _Plan, model_trace: Trace, guide_trace: Trace) -> Tensor:
        posteriors = read_posteriors(guide_trace, plan.supports)
        offsets = {
            observed: -level.exponent * plug_in(posteriors[name].fn, level.exponent)[1]
            for name, level in plan.noise.items()
            for observed in level.observed
        }
        # What is not closed is estimated from the guide's draws, all statements of the guide
        # against all priors, since several sites may share a statement.
        free_energy = torch.zeros(())
        closed: set[str] = set()
        for name, node in _sample_statements(model_trace):
            if node["is_observed"]:
                density = self._log_likelihood(node["fn"], node["value"])
                if name in offsets:
                    density = density + _spread(node["fn"], offsets[name])
                free_energy = free_energy - _total(node, density)
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
                free_energy = free_energy + _total(posterior.nodes[0], divergence)
                closed.update(statement["name"] for statement in posterior.nodes)
            else:
                draw = posteriors[name].draw
                free_energy = free_energy - _total(node, node["fn"].log_prob(draw))
        for name, node in _sample_statements(guide_trace):
            if name not in closed:
                free_energy = free_energy + _total(node, node["fn"].log_prob(node["value"]))
        return free_energy

    def _plan_for(self, model: Any, guide: Any, args: Any, kwargs: Any) -> _Plan:
        if self._plan is None or (self._plan.model, self._plan.guide) != (model, guide):
            self._plan = self._make_plan(model, guide, args, kwargs)
        return self._plan

    def _make_plan(self, model: Any, guide: Any, args: Any, kwargs: Any) -> _Plan:
        guide_trace = poutine.block(poutine.trace(guide).get_trace)(*args, **kwargs)

        def run(values: Mapping[str, Any]) -> Trace:
            return _run(model, guide_trace, values, args, kwargs)

        validate = is_validation_enabled()
        with poutine.block(), dry_run(model), torch.no_grad():
            model_trace = run({})
            if validate:
                model_trace.compute_log_prob()
                for _, site in _sample_statements(model_trace):
                    check_site_shape(site, self.max_plate_nesting)
            latent = {n: s for n, s in _sample_statements(model_trace) if not s["is_observed"]}
            _check_sites(guide_trace, latent)
            supports = {name: site["fn"].support for name, site in latent.items()}
            posteriors = read_posteriors(guide_trace, supports)
            plan = _Plan(
                model,
                guide,
                supports,
                find_noise(run, posteriors),
                frozenset(n for n, s in latent.items() if _is_closed(posteriors[n], s)),
                frozenset(n for n, posterior in posteriors.items() if posterior.normal is not None),
                frozenset(_rows(model_trace)),
            )
            return self._refine(plan, run, posteriors)


@dataclass(frozen=True)
class _Plan:
    """What an estimator learned of a model and a guide before its first step.

    ``analytic`` are the sites with independent normal elements of which the expectation is taken,
    ``closed`` those whose divergence from the prior is closed; ``rows`` are the numbers of
    observations.
    """

    model: Any
    guide: Any
    supports: Mapping[str, Constraint]
    noise: Mapping[str, NoiseLevel]
    closed: frozenset[str]
    analytic: frozenset[str]
    rows: frozenset[int]


class GlobalELBO(Estimator):
    r"""One draw of all weights for the whole batch.

    .. math:: F \approx -\ln p(y \mid \theta) + KL(q \,\|\, p), \qquad \theta \sim q

    Works for every reparameterised guide.

    Parameters
    ----------
    num_particles : int
        Draws to average.

    References
    ----------
    Blundell et al. (2015), "Weight uncertainty in neural networks", arXiv:1505.05424, eq. 2.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model():
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(1.0))
    >>> svi = pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), GlobalELBO())
    >>> svi.step() > 0
    True
    """

    def _values(self, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:  # noqa: ARG002
        return {}


class LocalELBO(Estimator):
    r"""Pre-activations are drawn instead of weights, one by one for each row.

    .. math:: a = x W \sim N(x \mu, x^2 \sigma^2)

    The expectation is that of `GlobalELBO`, the gradients vary less. It takes independent normal
    posteriors, as those of ``AutoNormal``. In ``linear``, ``@``, ``einsum``, ``*``, ``+`` and
    ``-`` the other operand must have one row an observation. In ``conv1d`` to ``conv3d`` positions
    that share weights are drawn by themselves, which changes the expectation a little. A site that
    is used otherwise, or more than once, is drawn as a whole, and a warning says so.

    Parameters
    ----------
    num_particles : int
        Draws to average.

    References
    ----------
    Kingma, Salimans & Welling (2015), "Variational dropout and the local reparameterization
    trick", arXiv:1506.02557, eq. 6.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> LocalELBO().loss(model, AutoNormal(model), torch.ones(3, 2), torch.ones(3)) > 0
    True
    """

    _local_uses: tuple[list[str], ...] = (["rows"], ["positions"])

    def _values(self, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        return local_weights(posteriors)

    def _refine(self, plan: _Plan, run: _Run, posteriors: Mapping[str, SitePosterior]) -> _Plan:
        weights = local_weights({name: posteriors[name] for name in plan.analytic}, plan.rows)
        run(weights)
        uses = {name: weight.uses for name, weight in weights.items()}
        local = frozenset(name for name, use in uses.items() if use in self._local_uses)
        self._report({name: use for name, use in uses.items() if use and name not in local})
        return replace(plan, analytic=local)

    def _report(self, whole: Mapping[str, list[str]]) -> None:
        for name, uses in whole.items():
            warnings.warn(
                f"the site {name!r} is drawn as a whole: local reparameterisation takes a weight "
                "that is used once, in a linear function of one row an observation; this one is "
                f"used in {uses}",
                stacklevel=6,
            )


class UnbiasedELBO(LocalELBO):
    """`LocalELBO` where that has the expectation of `GlobalELBO`, which it is elsewhere.

    For measuring the free energy.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model():
    ...     pyro.sample("y", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=W)
    >>> W = torch.tensor(1.0)
    >>> UnbiasedELBO().loss(model, AutoNormal(model)) > 0
    True
    """

    _local_uses = (["rows"],)

    def _report(self, whole: Mapping[str, list[str]]) -> None:
        pass


class MomentsELBO(Estimator):
    r"""Means and variances are propagated through the model; nothing is drawn.

    Exact where the likelihood is Gaussian and its mean a sum in which each weight occurs once,
    otherwise an approximation that takes the elements of every tensor as independent Gaussians; see
    `pyro_bmr.moments`. Start the posterior means at small random values, since with exact zeros the
    units of a layer would stay equal for ever.

    References
    ----------
    Haussmann, Hamprecht & Kandemir (2019), "Sampling-free variational inference of Bayesian neural
    networks by variance backpropagation", arXiv:1805.07654.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> args = model, AutoNormal(model), torch.ones(3, 2), torch.ones(3)
    >>> elbo = MomentsELBO()
    >>> elbo.loss(*args) == elbo.loss(*args)
    True
    """

    def __init__(self) -> None:
        super().__init__()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        # Validation would look at the values of parameters, which here are distributions.
        with pyro.validation_enabled(False):
            return super()._get_trace(model, guide, args, kwargs)

    def _values(self, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        return {
            name: gaussian(posterior.normal.mean, posterior.normal.variance)
            for name, posterior in posteriors.items()
        }

    def _log_likelihood(self, fn: Any, value: Tensor) -> Tensor:
        return expected_log_prob(fn, value)

    def _refine(self, plan: _Plan, run: _Run, posteriors: Mapping[str, SitePosterior]) -> _Plan:  # noqa: ARG002
        for name, posterior in posteriors.items():
            if name not in plan.analytic and name not in plan.noise:
                msg = (
                    f"the moments of the site {name!r} cannot be propagated: its posterior is "
                    f"{posterior.fn or 'known by draws only'}. Expected independent normal "
                    "elements, as those of AutoNormal over the real line, or a noise level that "
                    "only sets the scale of Normal observations; use the estimator 'local' or "
                    "'global'"
                )
                raise ValueError(msg)
            if name not in plan.closed:
                msg = (
                    f"the divergence of the site {name!r} from its prior is not closed. Expected "
                    "a prior for which torch.distributions.kl_divergence knows it, such as a "
                    "Normal or Laplace; use the estimator 'local' or 'global'"
                )
                raise ValueError(msg)
        return plan


_Run = Callable[[Mapping[str, Any]], Trace]


def _run(model: Any, guide_trace: Trace, values: Any, args: Any, kwargs: Any) -> Trace:
    with ValueMessenger(values):
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def _sample_statements(trace: Trace) -> Iterator[tuple[str, Any]]:
    for name, node in trace.nodes.items():
        if (
            node["type"] == "sample"
            and not site_is_subsample(node)
            and not node["infer"].get("_deterministic", False)
        ):
            yield name, node


def _total(node: Any, density: Tensor) -> Tensor:
    return scale_and_mask(density, node["scale"], node["mask"]).sum()


def _is_closed(posterior: SitePosterior, prior: Any) -> bool:
    statement = posterior.nodes[0]
    if posterior.fn is None or statement["mask"] is not None or prior["mask"] is not None:
        return False
    scales = (torch.as_tensor(node["scale"]) for node in (statement, prior))
    try:
        return torch.equal(*scales) and kl_divergence(posterior.fn, prior["fn"]) is not None
    except NotImplementedError:
        return False


def _rows(trace: Trace) -> Iterator[int]:
    """Yield what may be the number of observations."""
    for _, node in _sample_statements(trace):
        if node["is_observed"]:
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
            "model; condition the model on those that shall be fixed, and use "
            "pyro.infer.TraceEnum_ELBO where discrete ones are enumerated"
        )
        raise ValueError(msg)
    for name, node in _sample_statements(guide_trace):
        if not node["fn"].has_rsample:
            msg = (
                f"the guide's {type(node['fn']).__name__} of the site {name!r} has no "
                "reparameterised draws. Expected a continuous posterior; marginalise discrete "
                "sites, or use pyro.infer.Trace_ELBO"
            )
            raise ValueError(msg)
