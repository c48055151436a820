"""Networks with Gaussian weights: outputs of layers are drawn; what is mostly noise is pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from problems import Problem
from pruned import Pruned, make_pruned
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, linear, softplus
from training import minimise

# Under each root and logarithm, whose slopes at 0 are infinite.
FLOOR = 1e-8


class VariationalLayer(nn.Module, ABC):
    """Linear units or filters with a posterior over their weights; ``forward`` draws outputs."""

    @abstractmethod
    def kl(self) -> Tensor:
        """Compute the KL divergence of posterior and prior in nats."""

    @abstractmethod
    def prune(self, threshold: float) -> dict[str, Tensor]:
        """Compute mean ``weight`` and ``bias``, zero where log α is not below a threshold."""


def train_layers(
    problem: Problem,
    seed: int,
    path: Path,
    make: Callable[[nn.Module, torch.Generator], VariationalLayer],
    warm_up: tuple[float, float],
    thresholds: Sequence[float],
) -> Iterator[Pruned]:
    """Minimise the free energy per image, then prune by threshold, without training again.

    The weight of the KL divergence is 0 before one fraction of the training, 1 after another, and
    linear between them.
    """
    network = problem.make_network(seed).to(memory_format=torch.channels_last)
    generator = torch.Generator("cpu").manual_seed(seed)
    layers = {n: make(m, generator) for n, m in network.named_children() if hasattr(m, "weight")}
    noisy = nn.Sequential(*(layers.get(n, m) for n, m in network.named_children()))
    start, end = warm_up
    epochs = problem.schedule.epochs

    def loss(x: Tensor, y: Tensor, done: float) -> Tensor:
        weight = min(1.0, max(0.0, (done - start) / (end - start)))
        kl = sum(layer.kl() for layer in layers.values())
        return cross_entropy(noisy(x), y) + weight / len(problem.x) * kl

    seconds = minimise(problem, list(noisy.parameters()), loss, epochs, generator, path)
    for threshold in thresholds:
        weights = {
            f"{name}.{kind}": value
            for name, layer in layers.items()
            for kind, value in layer.prune(threshold).items()
        }
        yield make_pruned(network, weights, threshold, epochs, seconds)


def draw_outputs(
    x: Tensor, mean: Tensor, variance: Tensor, bias: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw outputs of linear units or of filters, each of them for itself.

    N(x ∘ mean + bias, x² ∘ variance), where ∘ is the layer's linear map. Source: Kingma, Salimans &
    Welling (2015), arXiv:1506.02557, eq. 6.
    """
    transform = linear if mean.dim() == 2 else conv2d
    center = transform(x, mean, bias)
    spread = transform(x.square(), variance, torch.full_like(bias, FLOOR)).sqrt()
    # In the order of memory, which draws channels that come last five times as fast.
    noise = center.new_empty(center.numel()).normal_(generator=generator)
    return torch.addcmul(center, spread, noise.as_strided(center.shape, center.stride()))


def log_alpha(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Compute the logarithm of variance over squared mean."""
    return log_variance - (mean.square() + FLOOR).log()


def log_uniform_kl(log_alpha: Tensor) -> Tensor:
    """Approximate KL(N(m, α m²) ‖ log-uniform) of each element, with 0 at infinite α.

    Source: Molchanov, Ashukha & Vetrov (2017), arXiv:1701.05369, eq. 14.
    """
    return 0.63576 * torch.sigmoid(-1.87320 - 1.48695 * log_alpha) + 0.5 * softplus(-log_alpha)
