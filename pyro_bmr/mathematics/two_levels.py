r"""Two levels of Gaussians: parameters of units, and effects of covariates on them.

.. math:: z_i = (x_i^\top \otimes I) \beta + \varepsilon_i, \quad
          \beta \sim N(\beta_0, B^{-1}), \quad
          \varepsilon_i \sim N(0, R^{-1}), \quad
          R = Q_0 + \sum_k e^{\gamma_k} Q_k, \quad
          \gamma \sim N(\gamma_0, H^{-1})

The likelihood of each unit is that of `read_likelihood`. Given :math:`\gamma` everything is
Gaussian and exact; over :math:`\gamma` there is Laplace's approximation. Source: Friston et al.
(2016), "Bayesian model reduction and empirical Bayes for group (DCM) studies", NeuroImage 128, who
take Laplace's over :math:`(\beta, \gamma)` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_bmr.mathematics.likelihoods import Likelihoods
from pyro_bmr.mathematics.newton import Maximum, maximise


@dataclass(frozen=True)
class SecondLevel:
    """Priors over k parameters and p covariates.

    ``mean`` ``(p * k,)`` and ``precision`` of the effects, those of a covariate together; ``floor``
    ``(k, k)`` and ``components`` ``(K, k, k)`` of the precision between units; ``log_mean``
    ``(K,)`` and ``log_precision`` ``(K, K)`` of γ.
    """

    mean: Tensor
    precision: Tensor
    floor: Tensor
    components: Tensor
    log_mean: Tensor
    log_precision: Tensor


@dataclass(frozen=True)
class GivenGamma:
    """The effects and the units given γ, and the log evidence over that of the first level.

    ``between`` is R; ``shrunk`` ``(N, k, k)`` the covariance of each unit given the effects;
    ``errors`` ``(N, k)`` the expected deviations of the units from what the effects say.
    """

    mean: Tensor
    precision: Tensor
    between: Tensor
    shrunk: Tensor
    errors: Tensor
    log_evidence: Tensor

    @cached_property
    def covariance(self) -> Tensor:
        """Of the effects, given γ."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision))

    @cached_property
    def between_covariance(self) -> Tensor:
        """The inverse of R."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.between))


def fit_hyperparameters(
    units: Likelihoods, design: Tensor, level: SecondLevel, start: Tensor | None = None
) -> Maximum:
    """Find the γ with the highest evidence times prior density; ``design`` is ``(N, p)``."""

    def log_prior(gamma: Tensor) -> Tensor:
        moved = gamma - level.log_mean
        return -(moved @ level.log_precision @ moved) / 2

    def value(gamma: Tensor) -> Tensor:
        found = condition(units, design, level, gamma)
        return log_prior(gamma) + (-torch.inf if found is None else found.log_evidence)

    def derivatives(gamma: Tensor) -> tuple[Tensor, Tensor]:
        found = condition(units, design, level, gamma)
        if found is None:
            msg = "the evidence has no derivatives where it is not defined"
            raise RuntimeError(msg)
        gradient, hessian = differentiate(units, design, level, gamma, found)
        moved = level.log_precision @ (gamma - level.log_mean)
        return gradient - moved, hessian - level.log_precision

    return maximise(value, derivatives, level.log_mean if start is None else start)


def log_evidence(level: SecondLevel, found: GivenGamma, maximum: Maximum) -> Tensor:
    r"""Integrate over γ by Laplace's approximation, around its maximum.

    :math:`\ln p(y | \hat\gamma) - \tfrac12 (\hat\gamma - \gamma_0)^\top H (\hat\gamma - \gamma_0)
    + \tfrac12 \ln |H| - \tfrac12 \ln |C|`, with :math:`C` minus the Hessian there.
    """
    moved = maximum.at - level.log_mean
    log_dets = level.log_precision.logdet() - maximum.curvature.logdet()
    return found.log_evidence + (log_dets - moved @ level.log_precision @ moved) / 2


def condition(
    units: Likelihoods, design: Tensor, level: SecondLevel, gamma: Tensor
) -> GivenGamma | None:
    r"""Solve both levels at a γ; None where a unit has no proper posterior.

    Unit i, with its own parameters integrated out, is a Gaussian in :math:`b_i = (x_i \otimes I)
    \beta`, with :math:`S = (L + R)^{-1}`, the precision :math:`J = R S L` and the linear term
    :math:`R S h` around its mean.
    """
    count, size = units.at.shape
    between = level.floor + (gamma.exp()[:, None, None] * level.components).sum(0)
    tril, failed = torch.linalg.cholesky_ex(units.curvature + between)
    between_tril, improper = torch.linalg.cholesky_ex(between)
    if failed.any() or improper:
        return None
    shrunk = torch.cholesky_inverse(tril)
    precision = between @ shrunk @ units.curvature
    precision = (precision + precision.mT) / 2
    pulled = (shrunk @ units.linear[..., None])[..., 0]
    linear = pulled @ between
    whole = torch.einsum("nab,nij->aibj", _pairs(design), precision)
    whole = whole.reshape(level.precision.shape) + level.precision

    def residual(effects: Tensor) -> Tensor:
        return design @ effects.reshape(-1, size) - units.at

    def times(matrix: Tensor, vectors: Tensor) -> Tensor:
        return (matrix @ vectors[..., None])[..., 0]

    whole_tril, failed = torch.linalg.cholesky_ex(whole)
    if failed:
        return None
    slope = (design.mT @ (linear - times(precision, residual(level.mean)))).reshape(-1)
    step = torch.cholesky_solve(slope[:, None], whole_tril)[:, 0]
    left = residual(level.mean + step)
    moved = times(precision, left)
    log_dets = count * _half_log_det(between_tril) - _half_log_det(tril).sum()
    log_dets = log_dets + _half_log_det(torch.linalg.cholesky(level.precision))
    log_dets = log_dets - _half_log_det(whole_tril)
    terms = (linear - moved / 2) * left + pulled * units.linear / 2
    value = units.constant.sum() + log_dets + terms.sum() - (step @ level.precision @ step) / 2
    errors = times(shrunk, units.linear - times(units.curvature, left))
    return GivenGamma(level.mean + step, whole, between, shrunk, errors, value)


def differentiate(
    units: Likelihoods, design: Tensor, level: SecondLevel, gamma: Tensor, found: GivenGamma
) -> tuple[Tensor, Tensor]:
    r"""Give the gradient and the Hessian of the log evidence with respect to γ.

    With the posterior :math:`N(\bar e, T)` of all deviations together, and :math:`P_k` the part of
    their prior precision :math:`P` that belongs to :math:`\gamma_k`,

    .. math:: g_k = \tfrac12 \operatorname{tr}[(P^{-1} - T) P_k] - \tfrac12 \bar e^\top P_k \bar e,
              \quad
              H_{kl} = \tfrac12 \operatorname{tr}[T P_k T P_l - P^{-1} P_k P^{-1} P_l]
              + \bar e^\top P_k T P_l \bar e + \delta_{kl} g_k

    where :math:`T_{ij} = \delta_{ij} S_i + x_i^\top x_j \otimes G_i A^{-1} G_j^\top` with
    :math:`G = S L` and :math:`A` the precision of the effects. Source: Fisher's identity, twice.
    """
    count, size = units.at.shape
    covariates = design.shape[1]
    parts = gamma.exp()[:, None, None] * level.components
    prior = found.between_covariance @ parts
    gains = found.shrunk @ units.curvature
    effects = found.covariance.reshape(covariates, size, covariates, size)
    inner = torch.einsum("nab,aibj->nij", _pairs(design), effects)
    spread = gains @ inner @ gains.mT
    within = found.shrunk + spread
    pushed = torch.einsum("kij,nj->kni", parts, found.errors)
    gradient = count * prior.diagonal(dim1=-2, dim2=-1).sum(-1)
    gradient = gradient - torch.einsum("nij,kji->k", within, parts)
    gradient = (gradient - torch.einsum("kni,ni->k", pushed, found.errors)) / 2

    own = found.shrunk.unsqueeze(1) @ parts
    both = (found.shrunk + 2 * spread).unsqueeze(1) @ parts
    curved = torch.einsum("nkij,nlji->kl", own, both)
    across = torch.stack(
        [torch.einsum("nab,nij->aibj", _pairs(design), gains.mT @ part @ gains) for part in parts]
    ).reshape(len(parts), covariates * size, covariates * size)
    across = found.covariance @ across
    curved = curved + torch.einsum("kij,lji->kl", across, across)
    curved = curved - count * torch.einsum("kij,lji->kl", prior, prior)
    carried = torch.einsum("nji,knj->kni", gains, pushed)
    carried = torch.einsum("na,kni->kai", design, carried).reshape(len(parts), -1)
    shrunk = torch.einsum("nij,knj->kni", found.shrunk, pushed)
    shift = torch.einsum("kni,lni->kl", shrunk, pushed)
    shift = shift + carried @ found.covariance @ carried.mT
    hessian = curved / 2 + shift + gradient.diag()
    return gradient, (hessian + hessian.mT) / 2


def _pairs(design: Tensor) -> Tensor:
    """Multiply the covariates of each unit by each other."""
    return design[:, :, None] * design[:, None, :]


def _half_log_det(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
