"""Expected log densities over Gaussian parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.nn import functional as F

from pyro_bmr.display import a_or_an
from pyro_bmr.estimators.gaussian_tensor import GaussianTensor, UnknownOperationError
from pyro_bmr.estimators.nonlinearities import quadrature_points


@singledispatch
def expected_log_prob(fn: td.Distribution, value: Tensor) -> Tensor:
    r"""Average a log density over the Gaussian parameters of its distribution.

    Exact for a `Normal` with a Gaussian mean,
    :math:`\ln \mathcal{N}(y; m, \sigma^2) - v / 2 \sigma^2`. By 31-node quadrature for a
    `Bernoulli` with Gaussian logits. A lower bound for a `Categorical` and a `OneHotCategorical`
    with Gaussian logits, so that the free energy stays an upper bound: see `logsumexp_bound`.
    Any of these in ``to_event``, ``mask`` and ``expand``. ``expected_log_prob.register(Family)``
    adds a family; one without a rule is an `UnknownOperationError`.

    In nats, of the shape of ``fn.log_prob(value)``. Construct ``fn`` while validation is off, as in
    ``pyro.validation_enabled(False)``, because it compares the elements of parameters.
    """
    found = [*dict.fromkeys(_gaussian_parameters(fn))] + ["value"] * isinstance(
        value, GaussianTensor
    )
    if not found:
        return fn.log_prob(value)
    msg = (
        f"the log density of {a_or_an(fn)} has no expectation here over a Gaussian "
        f"{' and '.join(found)}. Expected a Normal with a Gaussian loc, or a Categorical, "
        "OneHotCategorical or Bernoulli with Gaussian logits. Use estimator 'local' or 'global', "
        f"or add a rule with @expected_log_prob.register({type(fn).__name__})"
    )
    raise UnknownOperationError(msg)


_without_rule = expected_log_prob.dispatch(object)


@expected_log_prob.register
def _(fn: td.Normal, value: Tensor) -> Tensor:
    if [*_gaussian_parameters(fn)] != ["loc"] or isinstance(value, GaussianTensor):
        return _without_rule(fn, value)
    loc: Any = fn.loc
    at_mean = td.Normal(loc.loc, fn.scale, validate_args=False).log_prob(value)
    return at_mean - 0.5 * loc.variance / fn.scale.square()


@expected_log_prob.register
def _(fn: td.Categorical, value: Tensor) -> Tensor:
    logits = vars(fn).get("logits")
    if not isinstance(logits, GaussianTensor):
        return _without_rule(fn, value)
    index, log_probs = torch.broadcast_tensors(value.long().unsqueeze(-1), logits.loc)
    return log_probs.gather(-1, index[..., :1]).squeeze(-1)


@expected_log_prob.register
def _(fn: td.OneHotCategorical, value: Tensor) -> Tensor:
    return expected_log_prob(fn._categorical, value.argmax(-1))


@expected_log_prob.register
def _(fn: td.Bernoulli, value: Tensor) -> Tensor:
    logits = vars(fn).get("logits")
    if not isinstance(logits, GaussianTensor):
        return _without_rule(fn, value)
    loc, variance, value = torch.broadcast_tensors(logits.loc, logits.variance, value)
    points, weights = quadrature_points(loc, variance)
    losses = F.binary_cross_entropy_with_logits(points, value.expand_as(points), reduction="none")
    return -(weights * losses).sum(0)


@expected_log_prob.register
def _(fn: td.Independent, value: Tensor) -> Tensor:
    return sum_rightmost(expected_log_prob(fn.base_dist, value), fn.reinterpreted_batch_ndims)


@expected_log_prob.register
def _(fn: MaskedDistribution, value: Tensor) -> Tensor:
    if fn._mask is False:
        return fn.log_prob(value)
    return scale_and_mask(expected_log_prob(fn.base_dist, value), mask=fn._mask)


@expected_log_prob.register
def _(fn: ExpandedDistribution, value: Tensor) -> Tensor:
    log_prob = expected_log_prob(fn.base_dist, value)
    return log_prob.expand(torch.broadcast_shapes(fn.batch_shape, log_prob.shape))


def _gaussian_parameters(fn: Any) -> Iterator[str]:
    for name, value in vars(fn).items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, GaussianTensor) and not name.startswith("_"):
                yield name
            elif isinstance(part, td.Distribution | td.Transform):
                yield from _gaussian_parameters(part)
