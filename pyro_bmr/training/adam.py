"""Adam on vectors that stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdamState:
    """Vectors of parameters, with running means of their gradients and of the squares of these.

    ``finite`` says whether all losses so far were; after one that was not, no step moves anything.
    """

    values: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: Tensor
    finite: Tensor

    @classmethod
    def like(cls, vectors: Sequence[Tensor]) -> AdamState:
        """Return the state before the first step, with values that are still to be set."""
        first = vectors[0]
        values, means, squares = ([torch.zeros_like(v) for v in vectors] for _ in range(3))
        finite = torch.ones((), dtype=torch.bool, device=first.device)
        return cls(values, means, squares, first.new_zeros(()), finite)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> AdamState:
        """Return the state of these ``tensors``."""
        *vectors, steps, finite = tensors
        count = len(vectors) // 3
        values, means, squares = (list(vectors[i : i + count]) for i in range(0, 3 * count, count))
        return cls(values, means, squares, steps, finite)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of `of`."""
        return [*self.values, *self.means, *self.squares, self.steps, self.finite]

    @torch.no_grad()
    def begin(self, values: Iterable[Tensor]) -> None:
        """Go to before the first step."""
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)
        for one in (*self.means, *self.squares, self.steps):
            one.zero_()
        self.finite.fill_(True)


def advance(
    state: AdamState, gradients: Sequence[Tensor], loss: Tensor, lr: Tensor, clip_norm: float | None
) -> None:
    """Take one step in place, if the loss is finite and all before it were."""
    state.finite.logical_and_(loss.isfinite())
    state.steps.add_(state.finite)
    parts = state.values, state.means, state.squares, shorten(gradients, clip_norm)
    for value, mean, square, gradient in zip(*parts, strict=True):
        after = update(value, mean, square, gradient, lr, state.steps)
        for old, new in zip((value, mean, square), after, strict=True):
            old.copy_(torch.where(state.finite, new, old))


def update(
    value: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, lr: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return what a step makes of parameters and means; ``steps`` counts it.

    .. math:: \theta \leftarrow \theta - \eta \frac{m / (1 - 0.9^t)}
              {\sqrt{v / (1 - 0.999^t)} + 10^{-8}}

    Source: Kingma & Ba (2015), arXiv:1412.6980, algorithm 1.
    """
    mean = torch.lerp(mean, gradient, 0.1)
    square = torch.lerp(square, gradient.square(), 0.001)
    # The corrections of the two means are numbers: let them not divide every element.
    rate, correction = lr / (1 - 0.9**steps), (1 - 0.999**steps).rsqrt()
    return value - rate * mean / (square.sqrt() * correction + 1e-8), mean, square


def shorten(gradients: Sequence[Tensor], clip_norm: float | None) -> list[Tensor]:
    """Shorten a gradient, of which these are parts, to this length if it is longer."""
    if clip_norm is None:
        return list(gradients)
    length = torch.stack([one.norm() for one in gradients]).norm()
    return [one * (clip_norm / length.clamp(min=clip_norm)) for one in gradients]
