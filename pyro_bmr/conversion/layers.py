"""Layers by what becomes of their parameters, and the names of these."""

from __future__ import annotations

from typing import Any

from torch import nn

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.RNNCellBase,
)
"""The layers whose weights and biases become sample sites, and those derived from them."""

NOT_BAYESIAN = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.PReLU,
)
"""Layers that keep parameters which are learned without a prior."""

LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
"""Layers whose weight is a table of rows, one for each index."""


def own_parameters(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the layer itself, each under all its names; not those of a prior."""
    learned = getattr(layer, "_pyro_params", {})
    own = layer.named_parameters(recurse=False, remove_duplicate=False)
    return [(key, p) for key, p in own if key.removesuffix("_unconstrained") not in learned]


def trainable_parameters(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of the layer itself that are not frozen."""
    return [(key, p) for key, p in own_parameters(layer) if p.requires_grad]


def buffer_name(key: str) -> str:
    """Where a layer keeps what its parameter was."""
    return f"{key}_pretrained"


def site_name(layer: Any, key: str) -> str:
    """Return what Pyro calls the site of a layer's parameter."""
    return f"{layer._pyro_name}.{key}" if layer._pyro_name else key
