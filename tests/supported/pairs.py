"""What the cases of the table of support are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 3, generator=GENERATOR)
Y = 1.5 * X[:, 0] + 0.5 * torch.randn(24, generator=GENERATOR)


@dataclass(frozen=True)
class Pair:
    """A model and its guide; ``finish`` makes of the trained guide what is reduced."""

    model: Callable[..., Any]
    guide: Any
    args: tuple[Any, ...] = (X, Y)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Any], Any] = lambda guide: guide
    create_plates: Callable[..., Any] | None = None


def observe(mean: Tensor, y: Tensor | None, noise: float | Tensor = 0.5) -> Tensor:
    """Say that there is a row of ``y`` for each one of ``mean``."""
    with pyro.plate("data", 24):
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)
