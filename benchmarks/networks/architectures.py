"""The networks that learn. Those of layers in a row can have any widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lenet_300_100(widths: Sequence[int]) -> nn.Sequential:
    """Two hidden layers (LeCun et al. 1998)."""
    first, second = widths
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, first), nn.ReLU()),
        *(nn.Linear(first, second), nn.ReLU()),
        nn.Linear(second, 10),
    )


def lenet_5(widths: Sequence[int]) -> nn.Sequential:
    """Two layers of filters, one of units (LeCun et al. 1998, in the widths of Caffe)."""
    first, second, third = widths
    return nn.Sequential(
        *(nn.Conv2d(1, first, 5), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * second, third), nn.ReLU()),
        nn.Linear(third, 10),
    )


def colour_lenet(widths: Sequence[int]) -> nn.Sequential:
    """LeNet-5 for images of 32 by 32 pixels in three colours, each layer with a ReLU."""
    first, second, third = widths
    return nn.Sequential(
        *(nn.Conv2d(3, first, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(25 * second, third), nn.ReLU()),
        nn.Linear(third, 10),
    )


def resnet_8(widths: Sequence[int]) -> nn.Sequential:
    """Make a residual network of three blocks (He et al. 2016, sec. 4.2), without batch norm.

    Averages over a batch would make the log likelihood of an image depend on the others.
    """
    first, second, third = widths
    return nn.Sequential(
        *(nn.Conv2d(3, first, 3, padding=1), nn.ReLU()),
        Residual(first, first, 1),
        Residual(first, second, 2),
        Residual(second, third, 2),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(third, 10),
    )


class Residual(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, taken: int, given: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(taken, given, 3, stride, padding=1)
        self.second = nn.Conv2d(given, given, 3, padding=1)
        same = taken == given and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(taken, given, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations of the next layer."""
        return F.relu(self.around(x) + self.second(F.relu(self.first(x))))


def vision_transformer(widths: Sequence[int]) -> nn.Sequential:
    """Make two blocks over 16 patches of a digit, and take the mean (Dosovitskiy et al. 2021).

    The widths are those of the tokens and of the hidden layer of a block; there are four heads.
    """
    width, hidden = widths
    return nn.Sequential(
        Patches(width),
        *(Block(width, 4, hidden), Block(width, 4, hidden)),
        nn.LayerNorm(width),
        Mean(),
        nn.Linear(width, 10),
    )


class Patches(nn.Module):
    """A token for each patch of 7 by 7 pixels, at fixed places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, width, 7, stride=7)
        places = torch.arange(16)[:, None] / 100 ** (torch.arange(width) / width)
        self.register_buffer("places", torch.cat([places.sin()[:, ::2], places.cos()[:, ::2]], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, of shape ``(images, 16, width)``."""
        return self.project(x).flatten(2).transpose(1, 2) + self.places


class Block(nn.Module):
    """Attention and a hidden layer, each after a norm and with a way around."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads)
        self.hidden = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after the block."""
        x = x + self.attention(self.norms[0](x))
        return x + self.hidden(self.norms[1](x))


class Attention(nn.Module):
    """Self-attention of several heads (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.take, self.give = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token takes from the others."""
        images, tokens, _ = x.shape
        parts = self.take(x).reshape(images, tokens, 3, self.heads, self.size)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.give(mixed.transpose(1, 2).reshape(images, tokens, self.heads * self.size))


class Mean(nn.Module):
    """The mean of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return an activation for each image."""
        return x.mean(1)
