"""The reduced models of a factor: which of its elements are present, and how probable that is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from pyro_bmr.averaging.subset_sampling import CHAINS, Visit, walk
from pyro_bmr.factors.joint import JointFactor
from pyro_bmr.mathematics.evidence import Correlated
from pyro_bmr.mathematics.subsets import MOST_ELEMENTS, delta_f_of_all_subsets, subset_members
from pyro_bmr.mathematics.sweep import sweep
from pyro_bmr.selection.scores import ElementScores

FEWEST_SAMPLES = 50

# By reducible site, the prior log odds that an element is present: of all, or of each.
LogOdds = Mapping[str, float | Tensor]


def read_spaces(scores: ElementScores, num_samples: int, seed: int) -> tuple[ModelSpace, ...]:
    """Find what can be present or absent in each factor that has a reducible site.

    ``num_samples`` are the steps of a walk over the subsets of more than 16 correlated elements.
    """
    spaces: list[ModelSpace] = []
    for factor in scores.factors:
        if isinstance(factor, JointFactor) and factor.priors:
            elements = open_elements(factor)
            few = len(elements.log_prior) <= MOST_ELEMENTS
            space = EnumeratedSpace(elements) if few else SampledSpace(elements, num_samples, seed)
            spaces.append(space)
        elif not isinstance(factor, JointFactor):
            kept = factor.kept()
            spaces += [
                IndependentSpace(name, scores.delta_f[name], kept[name].contiguous())
                for name in factor.priors
            ]
    return tuple(spaces)


@dataclass(frozen=True)
class Presences:
    """How probable it is that the elements of a factor are present, by site.

    0 where pruned before, 1 where an element cannot go; no Monte Carlo error where that is exact.
    """

    probability: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor]
    method: str


class ModelSpace(ABC):
    """What of a factor can be present or absent."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether probabilities come without a Monte Carlo error."""

    @abstractmethod
    def expected_kept(self, log_odds: LogOdds) -> dict[str, float]:
        """By site, how many elements are present on average, under prior log odds by site."""

    @abstractmethod
    def presences(self, log_odds: LogOdds) -> Presences:
        """Return the probability that each element is present, under prior log odds by site."""


@dataclass(frozen=True)
class IndependentSpace(ModelSpace):
    """Elements of a site that are present or absent independently of all others.

    ``delta_f`` of dropping each, in nats; ``kept`` is False where an element was pruned before.
    """

    name: str
    delta_f: Tensor
    kept: Tensor

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @override
    def expected_kept(self, log_odds: LogOdds) -> dict[str, float]:
        parts = sweep(_sum_present, *self._tensors(log_odds))
        return {self.name: float(torch.stack(parts).sum())}

    @override
    def presences(self, log_odds: LogOdds) -> Presences:
        probability = torch.empty_like(self.delta_f, memory_format=torch.contiguous_format)
        sweep(_write_present, *self._tensors(log_odds), probability)
        return Presences({self.name: probability}, {}, "independent")

    def _tensors(self, log_odds: LogOdds) -> tuple[Tensor, ...]:
        device = self.delta_f.device
        zeta = torch.as_tensor(log_odds[self.name], dtype=torch.float64, device=device)
        zeta = zeta.expand(self.delta_f.shape) if zeta.dim() else zeta[None]
        return self.delta_f.contiguous(), self.kept.view(torch.uint8), zeta


@dataclass(frozen=True)
class OpenElements:
    """The elements of a correlated factor that may be present or absent.

    ``mask``: True for these among all that are left. ``posterior``: their marginal, in float64.
    ``log_prior``: ln p(θ_i = 0) in nats.
    """

    factor: JointFactor
    mask: Tensor
    posterior: Correlated
    log_prior: Tensor

    def complete(self, vector: Tensor, closed: float | bool = 1) -> Tensor:
        """Add the elements that cannot go, with the value ``closed``, along the last dimension."""
        full = vector.new_full(vector.shape[:-1] + self.mask.shape, closed)
        full[..., self.mask] = vector
        return full

    def by_site(self, vector: Tensor, closed: float) -> dict[str, Tensor]:
        """Bring a value per element that may go into shapes of sites; 0 where pruned before."""
        values = self.complete(vector.to(self.factor.posterior.loc.dtype), closed)
        spread = self.factor.spread(values, 0.0)
        return {name: spread[name] for name in self.factor.priors}

    def log_odds(self, by_site: LogOdds) -> Tensor:
        """Give each element that may go the log odds of its site."""
        device = self.mask.device
        values = {
            site.name: torch.as_tensor(
                by_site.get(site.name, 0.0), dtype=torch.float64, device=device
            )
            for site in self.factor.sites
        }
        return self.factor.flatten(values)[self.mask]


@dataclass(frozen=True)
class EnumeratedSpace(ModelSpace):
    """All subsets of up to 16 correlated elements."""

    elements: OpenElements

    @property
    def exact(self) -> bool:
        """True."""
        return True

    @cached_property
    def delta_f(self) -> Tensor:
        """Joint ΔF in nats of every subset, of shape ``(2**n,)``."""
        return delta_f_of_all_subsets(self.elements.posterior, self.elements.log_prior)

    @cached_property
    def kept(self) -> Tensor:
        """What every subset keeps, of shape ``(2**n, n)``."""
        count = len(self.elements.log_prior)
        index = torch.arange(len(self.delta_f), device=self.delta_f.device)
        return ~subset_members(index, count)

    def log_weight(self, log_odds: LogOdds) -> Tensor:
        """Return the log posterior probability of every subset, under prior log odds by site."""
        prior = self.kept.to(self.delta_f) @ self.elements.log_odds(log_odds)
        return torch.log_softmax(prior - self.delta_f, 0)

    @override
    def expected_kept(self, log_odds: LogOdds) -> dict[str, float]:
        return _expected_kept(self.presences(log_odds))

    @override
    def presences(self, log_odds: LogOdds) -> Presences:
        probability = self.log_weight(log_odds).exp() @ self.kept.to(self.delta_f)
        method = f"{len(self.delta_f):,} subsets"
        # Rounding may leave a sum of weights just above 1.
        return Presences(self.elements.by_site(probability.clamp_max(1.0), 1.0), {}, method)


@dataclass(frozen=True)
class SampledSpace(ModelSpace):
    """Subsets of many correlated elements, visited by a walk of ``num_samples`` steps."""

    elements: OpenElements
    num_samples: int
    seed: int

    @property
    def exact(self) -> bool:
        """False."""
        return False

    def visits(self, log_odds: LogOdds, num_samples: int) -> Iterator[Visit]:
        """Walk, and leave out the first fifth of the steps, the way there."""
        odds = self.elements.log_odds(log_odds)
        steps = walk(self.elements.posterior, self.elements.log_prior, odds, num_samples, self.seed)
        yield from (visit for i, visit in enumerate(steps) if i >= num_samples // 5)

    @override
    def expected_kept(self, log_odds: LogOdds) -> dict[str, float]:
        return _expected_kept(self._estimate(log_odds, max(FEWEST_SAMPLES, self.num_samples // 10)))

    @override
    def presences(self, log_odds: LogOdds) -> Presences:
        return self._estimate(log_odds, self.num_samples)

    def _estimate(self, log_odds: LogOdds, num_samples: int) -> Presences:
        tally = PresenceTally(self, num_samples)
        for visit in self.visits(log_odds, num_samples):
            tally.add(visit)
        return tally.presences()


class PresenceTally:
    """Estimates probabilities of presence from the visits of a walk, one after the other.

    By means of batches, so many per chain, each longer, we hope, than the memory of the walk.
    """

    def __init__(self, space: SampledSpace, num_samples: int) -> None:
        self._elements, self._num_samples = space.elements, num_samples
        like, size = space.elements.posterior.loc, len(space.elements.log_prior)
        self._weight = like.new_zeros(CHAINS, BATCHES)
        self._present = like.new_zeros(CHAINS, BATCHES, size)
        self._count = 0

    def add(self, visit: Visit) -> None:
        """Count where the chains are."""
        batch = self._count * BATCHES // count_visits(self._num_samples)
        self._weight[:, batch] += visit.weight
        self._present[:, batch] += visit.weight[:, None] * visit.presence
        self._count += 1

    def presences(self) -> Presences:
        """Return the probabilities, and their Monte Carlo errors."""
        weight = self._weight.reshape(-1)
        mean, error = ratio_of_sums(weight, self._present.flatten(0, 1))
        method = f"{CHAINS} walks of {self._num_samples:,}"
        elements = self._elements
        return Presences(elements.by_site(mean, 1.0), elements.by_site(error, 0.0), method)


BATCHES = 5


def count_visits(num_samples: int) -> int:
    """Tell how many steps of a walk count."""
    return num_samples - num_samples // 5


def ratio_of_sums(weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mean and its standard error from the weights and weighted sums of batches."""
    mean = total.sum(0) / weight.sum()
    # Of a ratio of sums, to first order: batches that last longer count more.
    residual = (total - weight[:, None] * mean) / weight.mean()
    batches = len(weight)
    return mean, (residual.square().sum(0) / (batches * (batches - 1))).sqrt()


def open_elements(factor: JointFactor) -> OpenElements:
    """Find what may be present or absent in a correlated factor."""
    posterior, log_prior = factor.left()
    mask = log_prior < torch.inf
    return OpenElements(factor, mask, posterior.split(mask)[0], log_prior[mask])


def _expected_kept(presences: Presences) -> dict[str, float]:
    return {n: float(p.sum(dtype=torch.float64)) for n, p in presences.probability.items()}


def _sum_present(_: None, delta_f: Tensor, kept: Tensor, zeta: Tensor) -> Tensor:
    return (torch.sigmoid(delta_f + zeta) * kept).sum(dtype=torch.float64)


def _write_present(_: None, delta_f: Tensor, kept: Tensor, zeta: Tensor, out: Tensor) -> None:
    out.copy_(torch.sigmoid(delta_f + zeta) * kept)
