r"""The prior of a site that depends on other sites, expected under their posterior.

With the posterior :math:`q(u)` of the parents :math:`u` held, a prior :math:`p(\theta \mid u)`
enters the free energy as :math:`E_{q(u)}[\ln p(\theta \mid u)]`, so that the spike changes it by

.. math:: \Delta F = E_{q(u)}[\ln p(\theta = 0 \mid u)] - \ln q(\theta = 0).

Where :math:`q(u)` is independent of :math:`\theta`, that is what the free energy of the reduced
model and guide differs by, and an upper bound on the difference after training them further, since
the parents may then move. Where one Gaussian holds both, conditioning on :math:`\theta = 0` also
moves the parents, which is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_bmr.factors.factor import Factor, Prior
from pyro_bmr.mathematics.gaussian import LOG_2PI, Diagonal, Natural
from pyro_bmr.priors.all_rows import read_prior
from pyro_bmr.priors.families import Reading, UnreadablePriorError
from pyro_bmr.programs.model_runs import ModelRuns

# Pairs of draws u and 2 E[u] - u per half, and so many directions that are orthogonal in them.
_PAIRS = 16
# Deviations from being affine that are rounding, in nats.
_TOLERANCE = 1e-4


def expect_priors(
    runs: ModelRuns, factors: Sequence[Factor], parents: Mapping[str, Collection[str]]
) -> tuple[dict[str, tuple[Prior, Tensor]], dict[str, str]]:
    r"""Take the expectation of priors under the posterior of the sites that they depend on.

    The model runs at 64 draws of the parents. These come in pairs that are symmetric about the
    posterior mean in unconstrained coordinates, and up to 16 coordinates at a time have exactly
    the covariance of the posterior. Expectations of functions that are affine or quadratic in so
    few of them are therefore exact, and those in more are estimates, whose error is noted: for a
    Normal prior with

    .. math:: \ln s = c + \sum_j a_j u_j, \quad E[\ln s] = c + \sum_j a_j E[u_j], \quad
              E[s^{-2}] = \exp(-2 E[\ln s] + 2 \mathrm{Var}[\ln s]),

    which covers all products and powers of positive sites whose posterior is LogNormal, as
    ``AutoNormal`` makes it whatever their prior. Other functions, such as the scale of a
    regularised horseshoe, are averaged over the draws.

    ``parents`` are, by site whose prior is wanted, the sites that it depends on. Returned are, by
    site, the expected prior with the standard error of its log density (nats; 0 where exact), and
    why the priors of other sites cannot be read at every draw. The expected log density is not
    that of the effective Gaussian, whose natural parameters are the expected ones.

    Source: Winn & Bishop (2005), "Variational message passing", JMLR 6, sec. 2; for draws in such
    pairs, Owen (2013), "Monte Carlo theory, methods and examples", sec. 8.2.
    """
    if not parents:
        return {}, {}
    wanted = {name for names in parents.values() for name in names}
    draws = draw_parents(factors, parents)
    halves: dict[str, list[_Half]] = {name: [] for name in parents}
    failures: dict[str, str] = {}
    with runs.elsewhere() as run:
        for index in range(2 * _PAIRS):
            places = [next(draws) for _ in range(2)]
            both = [(run(place), partial(run, place)) for place in places]
            for name in parents.keys() - failures.keys():
                try:
                    pair = _Pair(*(read_prior(name, nodes, rerun) for nodes, rerun in both))
                except UnreadablePriorError as error:
                    failures[name] = f"at some values of {', '.join(sorted(wanted))} {error}"
                    continue
                if index % _PAIRS == 0:
                    halves[name].append(_Half(pair))
                halves[name][-1].add(pair)
    expected = {
        name: _combine(*(half.expectation() for half in two))
        for name, two in halves.items()
        if name not in failures
    }
    return expected, failures


def draw_parents(
    factors: Sequence[Factor], parents: Mapping[str, Collection[str]]
) -> Iterator[dict[str, Tensor]]:
    """Draw the parents of all sites, in symmetric pairs; nothing where there are none."""
    wanted = {name for names in parents.values() for name in names}
    holders = [(f, {s.name for s in f.sites} & wanted) for f in factors]
    holders = [(factor, names) for factor, names in holders if names]
    normals = _Design(len(holders)).normals
    draws = zip(*(factor.draws(names, normals) for factor, names in holders), strict=True)
    return map(_merged, draws)


class _Design:
    """Standard normals in symmetric pairs, for so many calls."""

    def __init__(self, num_calls: int) -> None:
        self.calls_left = num_calls
        self.generator = torch.Generator(device="cpu").manual_seed(0)
        shape = (2, _PAIRS, _PAIRS)
        square = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        # The columns of each half are orthogonal, and their squares add up to the number of pairs.
        self.directions = torch.linalg.qr(square).Q * _PAIRS**0.5
        self.used = 0

    def normals(self, size: int) -> Iterator[Tensor]:
        """Yield a vector per draw; elements of one call share directions if there are too few."""
        left = max(_PAIRS - self.used, self.calls_left)
        mine = max(1, min(size, left - self.calls_left + 1))
        columns = (self.used + torch.arange(mine, device="cpu")) % _PAIRS
        self.used += mine
        self.calls_left -= 1
        random = partial(torch.rand, size, generator=self.generator, device="cpu")
        # Which element has which direction and sign differs between the halves.
        plans = [(columns[random().argsort() % mine], random().round() * 2 - 1) for _ in range(2)]
        for directions, (column, sign) in zip(self.directions, plans, strict=True):
            for row in directions:
                noise = row[column] * sign
                yield noise
                yield -noise


class _Pair:
    """The prior at two draws that are symmetric about the mean."""

    def __init__(self, plus: Reading, minus: Reading) -> None:
        self.log_density = (plus.log_density + minus.log_density) / 2
        self.gaussians = [r.gaussian for r in (plus, minus) if r.gaussian is not None]
        if self.gaussians:
            self.locs = [g.loc for g in self.gaussians]
            self.log_scales = [g.scale.log() for g in self.gaussians]
            self.loc = (self.locs[0] + self.locs[1]) / 2
            self.log_scale = (self.log_scales[0] + self.log_scales[1]) / 2


class _Half:
    """Means over the pairs of one half of the draws."""

    def __init__(self, centre: _Pair) -> None:
        self.centre = centre
        self.sums: dict[str, Tensor] = {}

    def add(self, pair: _Pair) -> None:
        density = pair.log_density - self.centre.log_density
        terms = {"density": density, "squared density": density.square()}
        if pair.gaussians:
            terms |= self._gaussian_terms(pair)
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(term)) + term / _PAIRS

    def _gaussian_terms(self, pair: _Pair) -> dict[str, Tensor]:
        # Where both are affine in the draws, all pairs have the same middle.
        loc_bend = (pair.loc - self.centre.loc).abs() / self.centre.log_scale.exp()
        loc_step, log_scale_step = (t[0] - t[1] for t in (pair.locs, pair.log_scales))
        precisions = [(2 * (self.centre.log_scale - t)).exp() for t in pair.log_scales]
        linears = [m * p for m, p in zip(pair.locs, precisions, strict=True)]
        return {
            "loc bend": loc_bend,
            "log scale bend": (pair.log_scale - self.centre.log_scale).abs(),
            "loc variance": loc_step.square() / 4,
            "log scale variance": log_scale_step.square() / 4,
            "covariance": loc_step * log_scale_step / 4,
            "precision": (precisions[0] + precisions[1]) / 2,
            "linear": (linears[0] + linears[1]) / 2,
        }

    def expectation(self) -> _Expectation:
        mean = self.sums
        variance = mean["squared density"] - mean["density"].square()
        error = (variance.clamp(min=0) / (_PAIRS - 1)).sqrt()
        density = self.centre.log_density + mean["density"]
        if "precision" not in mean:
            return _Expectation(density, error)
        # Weighting jointly Gaussian m and ln s by s^-2 moves m by -2 Cov(m, ln s).
        log_linear = mean["log scale bend"] < _TOLERANCE
        affine = log_linear & (mean["loc bend"] < _TOLERANCE)
        unit = (-2 * self.centre.log_scale).exp()
        tilted = self.centre.loc - 2 * mean["covariance"]
        gain = torch.where(log_linear, (2 * mean["log scale variance"]).exp(), mean["precision"])
        linear = torch.where(affine, tilted * gain, mean["linear"]) * unit
        square = (tilted.square() + mean["loc variance"]) * gain * unit
        exact = -0.5 * (LOG_2PI + square) - self.centre.log_scale
        exact = torch.where(density.isfinite(), exact, density)
        density, error = torch.where(affine, exact, density), torch.where(affine, 0, error)
        return _Expectation(density, error, Natural(linear, gain * unit))


def _merged(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for part in parts for name, value in part.items()}


def _combine(first: _Expectation, second: _Expectation) -> tuple[Prior, Tensor]:
    density = (first.log_density + second.log_density) / 2
    # Halves differ where the prior mixes elements that share directions.
    between = (first.log_density - second.log_density).abs() / 2
    within = (first.error.square() + second.error.square()).sqrt() / 2
    infinite = ~density.isfinite()
    density = torch.where(infinite, torch.inf, density)
    error = torch.where(infinite, 0, torch.maximum(between, within))
    if first.natural is None or second.natural is None:
        return Prior(density), error
    both = first.natural + second.natural
    loc, scale = both.linear / both.precision, (both.precision / 2).rsqrt()
    # A scale of 0, whose density is infinite, has no finite natural parameters.
    proper = both.precision.isfinite() & both.linear.isfinite()
    return Prior(density, Diagonal(loc.where(proper, 0), scale.where(proper, 0))), error


@dataclass(frozen=True)
class _Expectation:
    log_density: Tensor
    error: Tensor
    natural: Natural | None = None
