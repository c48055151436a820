"""Mean-field layers of bayesian-torch: their weights, and the prior that they were trained with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.functional import softplus

from pyro_bmr.arguments.checks import check_kind
from pyro_bmr.display import a_or_an

# A kernel is a weight to its prior, as it is to torch.
_WEIGHTS = {"weight": "weight", "kernel": "weight", "bias": "bias"}


def read_bayesian_torch(module: Any) -> dict[str, Any]:
    r"""Return the arguments of a posterior: :math:`\mu` and :math:`\ln(1 + e^\rho)` of each weight.

    Its layers take what they call the prior's variance for its standard deviation.
    """
    check_kind("module", module, nn.Module, "a torch module with layers of bayesian-torch")
    found: dict[str, dict[str, Any]] = {}
    for path, layer in module.named_modules():
        for name, moments in _layer(layer):
            for moment, value in moments.items():
                found.setdefault(moment, {})[f"{path}.{name}" if path else name] = value
    if not found:
        msg = (
            f"got {a_or_an(module)} without mean-field layers. Expected layers of "
            "bayesian-torch, such as LinearReparameterization; dnn_to_bnn makes them"
        )
        raise ValueError(msg)
    return found


def _layer(layer: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for suffix, name in _WEIGHTS.items():
        loc, rho = getattr(layer, f"mu_{suffix}", None), getattr(layer, f"rho_{suffix}", None)
        if loc is None or rho is None:
            continue
        values = {
            "mean": loc.detach().double(),
            "scale": softplus(rho.detach().double()),
            "prior_mean": getattr(layer, f"prior_{name}_mu").double(),
            "prior_scale": getattr(layer, f"prior_{name}_sigma").double(),
        }
        yield name, values
