"""Linear hierarchies of Gaussians, solved at once over all data, in numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import multivariate_normal

import pyro_bmr as bmr

FLOOR = 1 / 4096


@dataclass
class Hierarchy:
    """Data y_i = H_i θ_i + noise of variance 1; the first `chosen` parameters have effects.

    `free` (N, n): where False, the subject has no such parameter.
    """

    inputs: list
    data: list
    design: np.ndarray
    prior_mean: np.ndarray
    prior: np.ndarray
    chosen: int
    free: np.ndarray
    effects: np.ndarray

    @property
    def names(self):
        return [f"{'AB'[i % 2]}({i // 2 + 1},1)" for i in range(len(self.prior_mean))]

    def posteriors(self, with_f=True):
        found = []
        for h, y, free in zip(self.inputs, self.data, self.free, strict=True):
            precision = h[:, free].T @ h[:, free] + np.linalg.inv(self.prior[free][:, free])
            covariance, mean = np.zeros_like(self.prior), np.where(free, 0, self.prior_mean)
            where = np.ix_(free, free)
            covariance[where] = np.linalg.inv(precision)
            residual = y - h @ self.prior_mean
            mean[free] = self.prior_mean[free] + covariance[where] @ h[:, free].T @ residual
            prior = np.zeros_like(self.prior)
            prior[where] = self.prior[where]
            level = None
            if with_f:
                marginal = h @ prior @ h.T + np.eye(len(y))
                level = -multivariate_normal(h @ self.prior_mean, marginal).logpdf(y)
            found.append(
                bmr.Posterior(
                    mean,
                    covariance=covariance,
                    prior_mean=self.prior_mean,
                    prior_covariance=prior,
                    names=self.names,
                    free_energy=level,
                )
            )
        return found

    def conditional_prior(self, unit):
        """Mean as a function of the chosen, and covariance, of the rest given the chosen."""
        free = np.flatnonzero(self.free[unit])
        c, u = free[free < self.chosen], free[free >= self.chosen]
        gain = self.prior[np.ix_(u, c)] @ np.linalg.inv(self.prior[np.ix_(c, c)])
        spread = self.prior[np.ix_(u, u)] - gain @ self.prior[np.ix_(c, u)]
        return c, u, gain, spread

    def group_prior(self, unit, mean, between):
        """Mean and covariance of all parameters of a subject; a fixed one stays where it is."""
        c, u, gain, spread = self.conditional_prior(unit)
        whole_mean, whole = self.prior_mean.copy(), np.zeros_like(self.prior)
        whole_mean[c] = mean[c]
        whole_mean[u] += gain @ (mean[c] - self.prior_mean[c])
        own = between[np.ix_(c, c)]
        whole[np.ix_(c, c)] = own
        whole[np.ix_(u, c)] = gain @ own
        whole[np.ix_(c, u)] = (gain @ own).T
        whole[np.ix_(u, u)] = spread + gain @ own @ gain.T
        return whole_mean, whole

    def joint(self, between, effect_mean, effect_covariance):
        """Mean and covariance of all data, and their covariance with the effects."""
        k = self.chosen
        means, blocks, slopes = [], [], []
        for i, (h, x) in enumerate(zip(self.inputs, self.design, strict=True)):
            zero, whole = self.group_prior(i, np.zeros(k), between)
            slope = np.stack(
                [self.group_prior(i, row, between)[0] - zero for row in np.eye(k)], axis=1
            )
            means.append(h @ zero)
            slopes.append(h @ slope @ np.kron(x, np.eye(k)))
            blocks.append(h @ whole @ h.T + np.eye(len(h)))
        slope = np.concatenate(slopes)
        covariance = slope @ effect_covariance @ slope.T
        at = 0
        for block in blocks:
            end = at + len(block)
            covariance[at:end, at:end] += block
            at = end
        return np.concatenate(means) + slope @ effect_mean, covariance, slope @ effect_covariance

    def solve(self, gamma, parts, effect_mean, effect_covariance):
        """The log evidence of all data, and mean and covariance of the effects."""
        between = self.between(gamma, parts)
        mean, covariance, cross = self.joint(between, effect_mean, effect_covariance)
        y = np.concatenate(self.data)
        gain = np.linalg.solve(covariance, cross).T
        evidence = multivariate_normal(mean, covariance).logpdf(y)
        return evidence, effect_mean + gain @ (y - mean), effect_covariance - gain @ cross

    def between(self, gamma, parts):
        """R⁻¹, with components that are lists of parameters."""
        expected = np.linalg.inv(self.prior[: self.chosen, : self.chosen] / 16)
        precision = expected * FLOOR
        for one, part in zip(gamma, parts, strict=True):
            precision[np.ix_(part, part)] += np.exp(one) * expected[np.ix_(part, part)]
        return np.linalg.inv(precision)

    def effect_prior(self):
        """SPM's: the prior of the first level for a constant, scaled by the covariates' size."""
        k = self.chosen
        squares = (self.design**2).mean(0)
        constant = np.linalg.lstsq(self.design, np.ones(len(self.design)), rcond=None)[0]
        mean = np.kron(np.round(constant, 12), self.prior_mean[:k])
        return mean, np.kron(np.diag(1 / squares), self.prior[:k, :k])

    def without(self, unit):
        keep = [i for i in range(len(self.data)) if i != unit]
        return replace(
            self,
            inputs=[self.inputs[i] for i in keep],
            data=[self.data[i] for i in keep],
            design=self.design[keep],
            free=self.free[keep],
        )


def simulate(
    seed,
    subjects=6,
    size=4,
    chosen=None,
    rows=6,
    prior=None,
    prior_mean=0.3,
    design=None,
    log_precisions=0.0,
    absent=(),
    effects=None,
):
    """Draw a study from its own priors; `absent` are pairs of subject and parameter."""
    rng = np.random.default_rng(seed)
    chosen = size if chosen is None else chosen
    if prior is None:
        root = rng.normal(size=(size, size))
        prior = 0.5 * np.eye(size) + 0.1 * root @ root.T
    if design is None:
        design = np.c_[np.ones(subjects), rng.normal(size=subjects)]
    free = np.ones((subjects, size), dtype=bool)
    for subject, parameter in absent:
        free[subject, parameter] = False
    study = Hierarchy([], [], design, np.full(size, prior_mean), prior, chosen, free, None)
    mean, covariance = study.effect_prior()
    if effects is None:
        effects = rng.multivariate_normal(mean, covariance)
    gamma = np.broadcast_to(log_precisions, chosen)
    between = study.between(gamma, [[i] for i in range(chosen)])
    if np.ptp(gamma) == 0:
        between = study.between(gamma[:1], [list(range(chosen))])
    for i, x in enumerate(design):
        own = np.kron(x, np.eye(chosen)) @ effects
        parameters = rng.multivariate_normal(*study.group_prior(i, own, between))
        inputs = rng.normal(size=(rows, size))
        inputs[:, ~free[i]] = 0.0
        study.inputs.append(inputs)
        study.data.append(inputs @ parameters + rng.normal(size=rows))
    return replace(study, effects=effects)
