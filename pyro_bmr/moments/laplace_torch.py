"""Posteriors of laplace-torch: the mode, the precision at it, and the prior precision."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyro_bmr.arguments.checks import refuse, refuse_kind
from pyro_bmr.moments.names import Layout


def read_laplace(la: Any) -> dict[str, Any]:
    """Return the arguments of a posterior: of all weights, of a last layer or of a subnetwork."""
    parts = ("mean", "model", "prior_mean", "prior_precision_diag", "posterior_precision")
    held = {*dir(type(la)), *getattr(la, "__dict__", ())}
    if not held.issuperset(parts):
        refuse_kind("la", la, "a Laplace approximation of weights, of laplace-torch")
    if not la.n_data:
        msg = "this Laplace approximation has seen no data. Expected a fitted one: la.fit(loader)"
        raise ValueError(msg)
    mean = la.mean.detach().double().reshape(-1)
    layout = Layout({name: weight.shape for name, weight in _weights(la).items()}, {})
    if layout.size != len(mean):
        msg = (
            f"got a Laplace approximation of {len(mean)} elements, but the weights that need "
            f"gradients have {layout.size}. Expected as many: were some frozen since?"
        )
        raise ValueError(msg)
    before, precision = la.prior_mean.detach().double(), la.prior_precision_diag.detach().double()
    if not (precision > 0).all():
        msg = "got a prior precision that is not positive. Expected a proper prior"
        raise ValueError(msg)
    # Of a subnetwork, the elements by name.
    places = getattr(la.backend, "subnetwork_indices", None)
    if places is None:
        weights: dict[str, Any] = {"mean": layout.split(mean)}
    else:
        names = layout.elements()
        weights = {"mean": mean[places], "names": [names[i] for i in places.tolist()]}
        before = before[places] if before.numel() == len(mean) else before
    prior = {"prior_mean": before, "prior_scale": precision.rsqrt()}
    return {**weights, **_spread(la.posterior_precision), **prior}


def _weights(la: Any) -> dict[str, Tensor]:
    """List the weights in the order of the mean, by their names in the model."""
    last = getattr(la.model, "last_layer", None)
    if isinstance(last, nn.Module) and hasattr(la, "_last_layer_name"):
        layer = getattr(la.model, "_last_layer_name", None)
        prefix = f"{layer}." if layer else ""
        return {f"{prefix}{name}": weight for name, weight in last.named_parameters()}
    held = {id(weight) for weight in la.params}
    named = la.model.named_parameters()
    return {name: weight for name, weight in named if id(weight) in held}


def _spread(precision: Any) -> dict[str, Tensor]:
    """Read a precision: dense, diagonal, of Kronecker factors, or of low rank and diagonal."""
    if isinstance(precision, tuple):
        (vectors, values), diagonal = precision
        precision = (vectors * values) @ vectors.mT + diagonal.diag()
    elif hasattr(precision, "to_matrix"):
        precision = precision.to_matrix()
    if not isinstance(precision, Tensor):
        refuse("posterior_precision", type(precision).__name__, "that of weights")
    precision = precision.detach().double()
    if precision.dim() == 1:
        return {"scale": precision.rsqrt()}
    return {"precision": (precision + precision.mT) / 2}
