r"""Estimators of the free energy, for `pyro.infer.SVI` and for `fit`.

They differ in how they take the expectation of the log likelihood over the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor
from typing_extensions import override

from pyro_bmr.display import warn
from pyro_bmr.estimators.estimator import Estimator, Plan, Run
from pyro_bmr.estimators.expectations import expected_log_prob
from pyro_bmr.estimators.gaussian_tensor import gaussian
from pyro_bmr.estimators.local_reparameterization import local_weights
from pyro_bmr.estimators.posteriors import SitePosterior
from pyro_bmr.programs.site_kinds import is_likelihood


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
    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model():
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(1.0))
    >>> svi = pyro.infer.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), GlobalELBO())
    >>> svi.step() > 0
    True
    """

    @override
    def _values(self, plan: Plan, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        return {}

    @override
    def _refine(self, plan: Plan, run: Run, posteriors: Mapping[str, SitePosterior]) -> Plan:
        return plan


class LocalELBO(Estimator):
    r"""Pre-activations are drawn instead of weights, one by one for each row.

    .. math:: a = x W \sim N(x \mu, x^2 \sigma^2)

    The expectation is that of `GlobalELBO`, the gradients vary less. It takes independent normal
    posteriors, as those of ``AutoNormal``. In ``linear``, ``@``, ``einsum``, ``*``, ``+`` and
    ``-`` the other operand must have one row per observation. In ``conv1d`` to ``conv3d`` positions
    that share weights are drawn by themselves, which changes the expectation a little.

    A site that a row takes more than once, as in a recurrent network or a layer that is applied to
    each element of a sequence, is drawn itself, once for each row, and that draw is the same at all
    of its uses; unless rows meet between them, as in attention over a batch, or rows times elements
    are more than 2²⁸. A site that is used otherwise is drawn as a whole, and a warning says so.

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
    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> LocalELBO().loss(model, AutoNormal(model), torch.ones(3, 2), torch.ones(3)) > 0
    True
    """

    _local_uses = frozenset({"rows", "positions"})
    # Rows, of a draw of what each takes more than once.
    _most_sharing = 1

    def _values(self, plan: Plan, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        return local_weights(posteriors, repeated=plan.repeated, most_sharing=self._most_sharing)

    def _refine(self, plan: Plan, run: Run, posteriors: Mapping[str, SitePosterior]) -> Plan:
        sites = {name: posteriors[name] for name in plan.analytic}

        def find_uses(repeated: frozenset[str]) -> dict[str, list[str]]:
            weights = local_weights(sites, plan.rows, repeated)
            run(weights)
            return {name: weight.uses for name, weight in weights.items()}

        uses = find_uses(frozenset())
        once = [[use] for use in self._local_uses]
        several = frozenset(name for name, use in uses.items() if use and use not in once)
        repeated = frozenset(
            name
            for name in several
            if max(plan.rows, default=1) * sites[name].draw.numel() <= _MOST_ROW_DRAWS
        )
        if repeated and _rows_meet(run, sites, plan.rows, repeated):
            repeated = frozenset()
        uses |= find_uses(repeated) if repeated else {}
        fits = frozenset(n for n, use in uses.items() if use and self._local_uses.issuperset(use))
        local = fits - (several - repeated)
        self._report({name: use for name, use in uses.items() if use and name not in local})
        return replace(plan, analytic=local, repeated=local & repeated)

    def _report(self, whole: Mapping[str, list[str]]) -> None:
        for name, uses in whole.items():
            warn(
                f"the site {name!r} is drawn as a whole: local reparameterisation takes a weight "
                "that is used in linear functions of one row per observation, and, if a row takes "
                "it more than once, in such as keep rows apart and for no more than 2²⁸ rows times "
                f"elements; this one is used in {uses}"
            )


# Numbers of rows times elements, a gigabyte of them.
_MOST_ROW_DRAWS = 1 << 28


def _rows_meet(
    run: Run,
    sites: Mapping[str, SitePosterior],
    rows: Collection[int],
    repeated: Collection[str],
) -> bool:
    """Tell whether the weights that one row draws reach what is observed of another."""
    densities = []
    for shift in (0.0, 1.0):
        torch.manual_seed(0)
        weights = local_weights(sites, rows, repeated)
        for weight in weights.values():
            weight.shift_first_row(shift)
        nodes = run(weights).nodes.values()
        densities.append([n["fn"].log_prob(n["value"]) for n in nodes if is_likelihood(n)])
    for before, after in zip(*densities, strict=True):
        changed = ~torch.isclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True)
        dims = [dim for dim, size in enumerate(changed.shape) if size in rows]
        others = changed.narrow(dims[0], 1, changed.shape[dims[0]] - 1) if dims else changed
        if others.any():
            return True
    return False


class UnbiasedELBO(LocalELBO):
    """`LocalELBO` where that leaves the expectation as it is, and `GlobalELBO` elsewhere.

    Of what rows take more than once, a few rows share a draw.
    """

    _local_uses = frozenset({"rows"})
    _most_sharing = 8

    def _report(self, whole: Mapping[str, list[str]]) -> None:
        pass


class MomentsELBO(Estimator):
    r"""Means and variances are propagated through the model; nothing is drawn.

    Exact where the likelihood is Gaussian and its mean a sum in which each weight occurs once,
    otherwise an approximation that takes the elements of every tensor as independent Gaussians.
    Start the posterior means at small random values, since with exact zeros the units of a layer
    would stay equal for ever.

    References
    ----------
    Haussmann, Hamprecht & Kandemir (2019), "Sampling-free variational inference of Bayesian neural
    networks by variance backpropagation", arXiv:1805.07654.

    Examples
    --------
    >>> import pyro, torch, pyro.distributions as dist
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

    @override
    def _values(self, plan: Plan, posteriors: Mapping[str, SitePosterior]) -> Mapping[str, Any]:
        return {
            name: gaussian(posterior.normal.mean, posterior.normal.variance)
            for name, posterior in posteriors.items()
        }

    def _log_likelihood(self, fn: Any, value: Tensor) -> Tensor:
        return expected_log_prob(fn, value)

    @override
    def _refine(self, plan: Plan, run: Run, posteriors: Mapping[str, SitePosterior]) -> Plan:
        if plan.enumeration.sites:
            msg = (
                f"the discrete sites {sorted(plan.enumeration.sites)} are summed out, and the "
                "expectation of the logarithm of that sum is not known by moments. Expected a "
                "model without such sites; use the estimator 'global'"
            )
            raise ValueError(msg)
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
