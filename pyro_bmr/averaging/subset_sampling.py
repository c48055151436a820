"""Random walks over subsets of correlated elements, which visit each as often as its evidence says.

For posteriors of too many elements to enumerate their subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.mathematics.contrast import Contrast
from pyro_bmr.mathematics.couplings import start_walk
from pyro_bmr.mathematics.elimination import eliminate
from pyro_bmr.mathematics.evidence import Correlated, delta_f_of_set
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, LowRank
from pyro_bmr.mathematics.singular_contrast import SingularContrast
from pyro_bmr.mathematics.tableau import make_tableau, sweep_tableau

CHAINS = 4


@dataclass(frozen=True)
class Visit:
    """Where the chains of a walk are, each at a subset; of shape ``(chains, n)`` or ``(chains,)``.

    ``delta_f``: joint, of all that is dropped, in nats. ``weight``: how long a chain stays there.
    ``presence``: probability that an element is kept, given the others or the latent normals; its
    weighted mean has a smaller variance than that of ``kept`` (Rao-Blackwell).
    """

    kept: Tensor
    delta_f: Tensor
    weight: Tensor
    presence: Tensor


def walk(
    posterior: Correlated, log_prior: Tensor, log_odds: Tensor, num_samples: int, seed: int
) -> Iterator[Visit]:
    r"""Walk over the subsets of elements that may be absent, as their evidence says.

    The target is :math:`P(S) \propto e^{-\Delta F_S} \prod_{i \notin S} o_i`, with prior odds
    :math:`o_i`; ``log_prior`` is :math:`\ln p(\theta_i = 0)` in nats, finite. The posterior is in
    float64. Chains start around the result of the greedy elimination.
    """
    device = posterior.loc.device
    generator = torch.Generator(device).manual_seed(seed)
    shift = (log_prior + 0.5 * LOG_2PI).to(posterior.loc)
    start = eliminate(posterior, log_prior.to(posterior.loc), 0.0).isposinf()
    noise = torch.rand(CHAINS, len(shift), generator=generator, device=device)
    kept = start ^ (noise < _SCATTER)
    yield from _WALK[type(posterior)](posterior, shift, log_odds, kept, num_samples, generator)


# Which part of the elements starts on the wrong side, so that chains that agree have met.
_SCATTER = 0.2

# After so many flips rounding errors of the tableau are cleared away.
_FLIPS_PER_TABLEAU = 100


def _flip(
    posterior: Correlated,
    shift: Tensor,
    log_odds: Tensor,
    kept: Tensor,
    num_samples: int,
    generator: torch.Generator,
) -> Iterator[Visit]:
    """Flip one element of a correlated posterior at a time, without ever rejecting.

    Of the flips that random-scan Gibbs sampling would make it draws the next one, and weights the
    subset by the time that Gibbs sampling would have stayed there. A tableau, swept on the dropped
    elements, holds what each element costs given all others; a flip is a sweep, O(n²).

    Source: Zanella & Roberts (2019), "Scalable importance tempering and Bayesian variable
    selection", JRSS B 81(3); Bortz, Kalos & Lebowitz (1975), J. Comput. Phys. 17(1); Dempster
    (1969) for the sweep operator.
    """
    chain = torch.arange(len(kept), device=kept.device)
    for step in range(num_samples):
        if step % _FLIPS_PER_TABLEAU == 0:
            start: Any = _Tableaus if isinstance(posterior, Dense) else _Walks
            chains = start(posterior, kept)
            delta_f = _delta_f(posterior, shift, kept)
        sign = torch.where(kept, 1.0, -1.0)
        cost = shift + chains.costs(sign)
        log_rate = torch.nn.functional.logsigmoid(-sign * (cost + log_odds))
        weight = (-log_rate.logsumexp(-1)).clamp_max(_LONGEST).exp()
        yield Visit(kept, delta_f, weight, torch.sigmoid(cost + log_odds))
        uniform = torch.rand(
            kept.shape, generator=generator, dtype=shift.dtype, device=shift.device
        )
        pivot = (log_rate - (-uniform.log()).log()).argmax(-1)
        kept = kept.clone()
        kept[chain, pivot] ^= True
        delta_f = delta_f + (sign * cost)[chain, pivot]
        chains.flip(pivot)


class _Tableaus:
    """Chains over the subsets of a Gaussian with independent priors, swept at once."""

    def __init__(self, posterior: Dense, kept: Tensor) -> None:
        self.tableau = torch.stack([make_tableau(posterior, ~k) for k in kept])

    def costs(self, sign: Tensor) -> Tensor:
        """Return what each element adds to h given the others; ``sign`` is 1 where it is kept."""
        # A kept element has mean m and variance t; for a dropped one, −t and m are the precision
        # and precision times mean that it has given the other dropped ones at zero.
        pivots = self.tableau.diagonal(dim1=-2, dim2=-1)[:, :-1]
        size = (sign * pivots).clamp_min(torch.finfo(pivots.dtype).tiny)
        return 0.5 * (sign * size.log() + self.tableau[:, :-1, -1].square() / size)

    def flip(self, pivot: Tensor) -> None:
        sweep_tableau(self.tableau, pivot)


class _Walks:
    """The same under a joint prior, a walk for each chain."""

    def __init__(self, posterior: Contrast | SingularContrast, kept: Tensor) -> None:
        self.walks = [start_walk(posterior, ~k) for k in kept]

    def costs(self, sign: Tensor) -> Tensor:
        return sign * torch.stack([walk.flips() for walk in self.walks])

    def flip(self, pivot: Tensor) -> None:
        for walk, index in zip(self.walks, pivot.tolist(), strict=True):
            walk.flip(index)


# Logarithm of the longest time at a subset: where it is cut, others weigh less than 1e-13.
_LONGEST = 30.0


def _redraw(
    posterior: LowRank,
    shift: Tensor,
    log_odds: Tensor,
    kept: Tensor,
    num_samples: int,
    generator: torch.Generator,
) -> Iterator[Visit]:
    """Draw the k latent normals of a low-rank posterior and its elements in turn, in O(n k²).

    Given the normals the elements are independent, and are drawn all at once.
    """
    factor, variance = posterior.cov_factor, posterior.cov_diag
    shift = shift + 0.5 * variance.log()
    alone = shift + 0.5 * posterior.loc.square() / variance
    weighted = factor / variance[:, None]
    rank = factor.shape[-1]
    identity = torch.eye(rank, dtype=shift.dtype, device=shift.device)
    weight = shift.new_ones(len(kept))
    for _ in range(num_samples):
        drop = (~kept).to(shift)
        precision = torch.stack([factor.mT @ (weighted * d[:, None]) for d in drop]) + identity
        tril = torch.linalg.cholesky(precision)
        noise = torch.randn(
            len(kept), rank, 1, generator=generator, dtype=shift.dtype, device=shift.device
        )
        linear = -((drop * posterior.loc) @ weighted)[..., None]
        mean = torch.cholesky_solve(linear, tril)
        log_determinant = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        delta_f = drop @ alone + log_determinant - 0.5 * (linear * mean).sum((-2, -1))
        latent = mean + torch.linalg.solve_triangular(tril.mT, noise, upper=True)
        loc = posterior.loc + latent[..., 0] @ factor.mT
        presence = torch.sigmoid(shift + log_odds + 0.5 * loc.square() / variance)
        uniform = torch.rand(kept.shape, generator=generator, device=kept.device)
        following = uniform < presence
        yield Visit(kept, delta_f, weight, presence)
        kept = following


def _delta_f(posterior: Correlated, shift: Tensor, kept: Tensor) -> Tensor:
    log_prior = shift - 0.5 * LOG_2PI
    return torch.stack([delta_f_of_set(posterior, log_prior, ~k) for k in kept])


_WALK: dict[type, Callable[..., Iterator[Visit]]] = {
    Dense: _flip,
    LowRank: _redraw,
    Contrast: _flip,
    SingularContrast: _flip,
}
