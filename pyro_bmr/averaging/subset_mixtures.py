"""Mixtures of the reduced posteriors of a correlated factor: all of them, or those of a walk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.averaging.model_space import (
    BATCHES,
    EnumeratedSpace,
    LogOdds,
    OpenElements,
    SampledSpace,
    count_visits,
    ratio_of_sums,
)
from pyro_bmr.averaging.subset_sampling import CHAINS, Visit
from pyro_bmr.mathematics.gaussian import Dense, LowRank
from pyro_bmr.mathematics.normal_mixtures import quantiles
from pyro_bmr.mathematics.subset_posteriors import condition_on_all_subsets

T = TypeVar("T")


def mix_all(space: EnumeratedSpace, log_odds: LogOdds) -> SubsetMixture:
    """Mix the posteriors of all subsets, by their probabilities under prior log odds by site."""
    weight = space.log_weight(log_odds).exp()
    elements = space.elements
    posterior = copy_tensors(elements.factor.conditioned())
    if isinstance(posterior, Dense | LowRank):
        return AllSubsets(elements, posterior, space.kept, weight)
    some = weight > _NEGLIGIBLE / len(weight)
    return ListedSubsets(elements, posterior, space.kept[some], weight[some] / weight[some].sum())


def copy_tensors(record: T) -> T:
    """Copy the tensors of a dataclass, which a guide may go on to train."""
    own = {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **{name: value.detach().clone() for name, value in own.items()})  # type: ignore[type-var]


# What models that are left out may weigh together.
_NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class MixtureMoments:
    """Mean and variance of every element that is left, and their Monte Carlo errors, if any."""

    mean: Tensor
    variance: Tensor
    mean_error: Tensor | None = None
    variance_error: Tensor | None = None


@dataclass(frozen=True)
class SubsetMixture(ABC):
    """The posteriors of subsets, each with a weight; ``weight`` adds up to 1.

    ``posterior``: of all that is left in the full model, in float64. ``kept``: what each subset
    keeps, ``(models, n)``, of the elements that may be absent.
    """

    elements: OpenElements
    posterior: Any
    kept: Tensor
    weight: Tensor

    @property
    def shares(self) -> Tensor | None:
        """How much of each weight is of each batch of a walk, ``(models, batches)``, or None."""
        return None

    @abstractmethod
    def moments(self) -> MixtureMoments:
        """Return the mean and the variance of the mixture."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """Return the covariance of the mixture, ``(n, n)`` over what is left."""

    @abstractmethod
    def project(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and standard deviation of linear combinations in each model.

        ``directions`` are ``(n, c)`` over what is left; what comes back is ``(models, c)``.
        """

    @abstractmethod
    def marginals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the same of the elements themselves, some columns after the other."""

    def quantiles(self, levels: tuple[float, ...]) -> Tensor:
        """Return quantiles of every element that is left, ``(levels, n)``."""
        some = self.weight > _NEGLIGIBLE / len(self.weight)
        weight = self.weight[some] / self.weight[some].sum()
        at_once = max(1, _IN_CACHE // len(weight))
        parts = []
        for loc, scale in self.marginals():
            few = zip(loc[some].split(at_once, 1), scale[some].split(at_once, 1), strict=True)
            for pair in few:
                parts.append(torch.stack([quantiles(weight, *pair, level) for level in levels]))
        return torch.cat(parts, 1)

    def draw(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Draw models, and from each of them, ``(num_samples, n)`` over what is left."""
        index = torch.multinomial(self.weight, num_samples, True, generator=generator)
        size = (num_samples, self.posterior.noise_size)
        like = self.weight
        noise = torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)
        return draw_models(self.posterior, self.elements.complete(self.kept[index], True), noise)


def draw_models(posterior: Any, kept: Tensor, noise: Tensor) -> Tensor:
    """Turn standard normals, ``(..., k)``, into draws of the models that keep ``(..., n)``."""
    latent = noise.new_zeros(kept.shape)
    models, which = kept.reshape(-1, kept.shape[-1]).unique(dim=0, return_inverse=True)
    which = which.reshape(kept.shape[:-1])
    for i, model in enumerate(models):
        rest = _left(posterior, model)
        mine = which == i
        full = latent[mine]
        full[:, model] = rest.transform(noise[mine])
        latent[mine] = full
    return latent


def _left(posterior: Any, kept: Tensor) -> Dense | LowRank:
    rest = posterior.split(~kept)[1]
    return rest if isinstance(rest, Dense | LowRank) else rest.gaussian()


class AllSubsets(SubsetMixture):
    r"""All subsets of up to 16 elements of a Gaussian.

    What cannot go, C, depends on what can, O, in the same way in every model: with the regression
    :math:`B = \Sigma_{CO} \Sigma_{OO}^{-1}`, :math:`\theta_C` is :math:`B \theta_O` and a
    Gaussian that is independent of it, that of C at :math:`\theta_O = 0`.
    """

    @override
    def moments(self) -> MixtureMoments:
        mean, covariance = self._open_moments
        closed = self._closed.marginals()
        rest = closed.scale.square() + ((self._gain @ covariance) * self._gain).sum(-1)
        mean = self._join(mean, closed.loc + self._gain @ mean)
        return MixtureMoments(mean, self._join(covariance.diagonal().clamp_min(0.0), rest))

    @override
    def covariance(self) -> Tensor:
        _, covariance = self._open_moments
        mask = self.elements.mask
        root = self._closed.root()
        full = covariance.new_zeros(len(mask), len(mask))
        full[mask[:, None] & mask] = covariance.reshape(-1)
        across = self._gain @ covariance
        full[~mask[:, None] & mask] = across.reshape(-1)
        full[mask[:, None] & ~mask] = across.mT.reshape(-1)
        full[~mask[:, None] & ~mask] = (across @ self._gain.mT + root @ root.mT).reshape(-1)
        return full

    @override
    def marginals(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(self.elements.mask)
        for index in torch.arange(size, device=self.weight.device).split(_COLUMNS):
            directions = self.weight.new_zeros(size, len(index))
            directions[index, torch.arange(len(index), device=index.device)] = 1.0
            yield self.project(directions)

    @override
    def project(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.elements.mask
        closed = directions[~mask]
        reached = directions[mask] + self._gain.mT @ closed
        loc = self.weight.new_empty(len(self.weight), directions.shape[1])
        variance = torch.empty_like(loc)
        for index, mean, rows in condition_on_all_subsets(self._open):
            loc[index] = mean @ reached
            variance[index] = (rows.mT @ reached).square().sum(1)
        own = _whiten(self._closed, closed).square().sum(0)
        return loc + self._closed.loc @ closed, (variance + own).sqrt()

    @cached_property
    def _open_moments(self) -> tuple[Tensor, Tensor]:
        count = self.kept.shape[1]
        mean, square = self.weight.new_zeros(count), self.weight.new_zeros(count, count)
        for index, loc, rows in condition_on_all_subsets(self._open):
            weight = self.weight[index]
            mean += weight @ loc
            square += (weight[:, None] * loc).mT @ loc
            flat = (weight.sqrt()[:, None, None] * rows).transpose(0, 1).flatten(1)
            square += flat @ flat.mT
        return mean, square - torch.outer(mean, mean)

    @cached_property
    def _open(self) -> Any:
        return self.posterior.split(self.elements.mask)[0]

    @cached_property
    def _closed(self) -> Any:
        return self.posterior.split(self.elements.mask)[1]

    @cached_property
    def _gain(self) -> Tensor:
        """Return B: what the mean of C is if one element of O had been at -1, all else at 0."""
        mask = self.elements.mask
        columns = []
        for i in mask.nonzero()[:, 0]:
            loc = torch.zeros_like(self.posterior.loc)
            loc[i] = -1.0
            columns.append(replace(self.posterior, loc=loc).split(mask)[1].loc)
        return torch.stack(columns, 1) if columns else self.weight.new_zeros(len(mask), 0)

    def _join(self, open_: Tensor, closed: Tensor) -> Tensor:
        full = self.elements.complete(open_)
        full[~self.elements.mask] = closed
        return full


@dataclass(frozen=True)
class ListedSubsets(SubsetMixture):
    """Some subsets of any number of elements, one by one; of a walk, with shares of batches."""

    by_batch: Tensor | None = None

    @property
    def shares(self) -> Tensor | None:
        """See `SubsetMixture.shares`."""
        return self.by_batch

    @override
    def moments(self) -> MixtureMoments:
        shares = self.weight[:, None] if self.by_batch is None else self.by_batch
        total = self.weight.new_zeros(2, shares.shape[1], len(self.elements.mask))
        for share, (kept, rest) in zip(shares, self._models(), strict=True):
            marginal = rest.marginals()
            square = marginal.scale.square() + marginal.loc.square()
            total[:, :, kept] += share[:, None] * torch.stack([marginal.loc, square])[:, None]
        mean, square = total.sum(1)
        variance = (square - mean.square()).clamp_min(0.0)
        if self.by_batch is None:
            return MixtureMoments(mean, variance)
        weight = shares.sum(0)
        _, error = ratio_of_sums(weight, total[0])
        # To first order, of the mean of (θ - mean)².
        around = total[1] - 2 * mean * total[0] + mean.square() * weight[:, None]
        return MixtureMoments(mean, variance, error, ratio_of_sums(weight, around)[1])

    @override
    def covariance(self) -> Tensor:
        size = len(self.elements.mask)
        mean, square = self.weight.new_zeros(size), self.weight.new_zeros(size, size)
        for weight, (kept, rest) in zip(self.weight, self._models(), strict=True):
            index = kept.nonzero()[:, 0]
            root = torch.cat([rest.root(), rest.loc[:, None]], 1)
            mean[index] += weight * rest.loc
            square[index[:, None], index] += weight * (root @ root.mT)
        return square - torch.outer(mean, mean)

    @override
    def marginals(self) -> Iterator[tuple[Tensor, Tensor]]:
        loc = self.weight.new_zeros(len(self.weight), len(self.elements.mask))
        scale = torch.zeros_like(loc)
        for i, (kept, rest) in enumerate(self._models()):
            marginal = rest.marginals()
            loc[i, kept], scale[i, kept] = marginal.loc, marginal.scale
        yield from zip(loc.split(_COLUMNS, 1), scale.split(_COLUMNS, 1), strict=True)

    @override
    def project(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.weight.new_zeros(len(self.weight), directions.shape[1])
        scale = torch.zeros_like(loc)
        for i, (kept, rest) in enumerate(self._models()):
            loc[i] = rest.loc @ directions[kept]
            scale[i] = torch.linalg.vector_norm(_whiten(rest, directions[kept]), dim=0)
        return loc, scale

    def _models(self) -> Iterator[tuple[Tensor, Any]]:
        posterior = self.posterior
        for kept in self.elements.complete(self.kept, True):
            yield kept, _left(posterior, kept)


# So many elements are projected at a time, and quantiles looked for among so many numbers.
_COLUMNS, _IN_CACHE = 16, 1 << 16


class SubsetTally:
    """Keeps some of the subsets that a walk visits, evenly spaced, for a mixture of them."""

    def __init__(self, space: SampledSpace) -> None:
        self._elements, self._visits = space.elements, count_visits(space.num_samples)
        self._posterior = copy_tensors(space.elements.factor.conditioned())
        most = _count_models(self._posterior)
        self._stride = max(1, self._visits * CHAINS // most)
        self._kept: list[Tensor] = []
        self._weight: list[Tensor] = []
        self._batch: list[int] = []
        self._count = 0

    def add(self, visit: Visit) -> None:
        """Keep where the chains are, if it is time to."""
        if self._count % self._stride == 0:
            self._kept.append(visit.kept.clone())
            self._weight.append(visit.weight)
            self._batch.append(self._count * BATCHES // self._visits)
        self._count += 1

    def mixture(self) -> ListedSubsets:
        """Return the mixture of what was kept, each by the time that chains stayed there."""
        kept, model = torch.cat(self._kept).unique(dim=0, return_inverse=True)
        weight = torch.stack(self._weight)
        batch = torch.tensor(self._batch, device=kept.device)
        batch = batch[:, None] + BATCHES * torch.arange(CHAINS, device=kept.device)
        shares = weight.new_zeros(len(kept), CHAINS * BATCHES)
        shares.index_put_((model, batch.reshape(-1)), weight.reshape(-1), accumulate=True)
        shares /= shares.sum()
        return ListedSubsets(self._elements, self._posterior, kept, shares.sum(1), shares)


# Of a walk, for so many multiplications models are looked at, and as many as fit into so many
# numbers, but no fewer than the last says.
_WORK, _NUMBERS, _FEWEST = 5e10, 1 << 24, 100


def _count_models(posterior: Any) -> int:
    size = len(posterior.loc)
    work = size * posterior.cov_factor.shape[1] ** 2 if isinstance(posterior, LowRank) else size**3
    return max(_FEWEST, int(min(_WORK / work, _NUMBERS / size)))


def _whiten(posterior: Any, directions: Tensor) -> Tensor:
    r"""Return :math:`R^\top a` for :math:`\Sigma = R R^\top`; a low-rank R is not formed."""
    if isinstance(posterior, LowRank):
        own = posterior.cov_diag.sqrt()[:, None] * directions
        return torch.cat([posterior.cov_factor.mT @ directions, own])
    return posterior.root().mT @ directions
