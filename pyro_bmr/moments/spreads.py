"""A number for each element, and covariances: given as such, as scales or as precisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import refuse
from pyro_bmr.moments.alignment import align_matrix, align_site, align_vector
from pyro_bmr.moments.names import Layout, read_numbers

# Of a correlation matrix, how far below zero rounding may take an eigenvalue.
_ROUNDING = 1e-7


def read_along(place: str, value: Any, layout: Layout) -> Tensor:
    """Read a number for each element: one for all, by site, or a vector."""
    if isinstance(value, Mapping):
        if value.keys() != layout.shapes.keys():
            refuse(place, sorted(map(str, value)), f"a value for each of {sorted(layout.shapes)}")
        parts = [
            _broadcast(f"{place}[{name!r}]", align_site(place, value[name], layout, name), shape)
            for name, shape in layout.shapes.items()
        ]
        return torch.cat([part.reshape(-1) for part in parts])
    shapes = [*layout.shapes.values()]
    shape = shapes[0] if len(shapes) == 1 else torch.Size([layout.size])
    return _broadcast(place, align_vector(place, value, layout), shape).reshape(-1)


def _broadcast(place: str, value: Any, shape: torch.Size) -> Tensor:
    numbers = read_numbers(place, value)
    if numbers.shape == shape or numbers.squeeze().shape == (shape.numel(),):
        return numbers.reshape(shape).clone()
    if numbers.numel() != 1:
        refuse(place, value, f"a number, or an array of shape {tuple(shape)}")
    return numbers.reshape(()).expand(shape).clone()


def read_spread(spreads: Mapping[str, Any], layout: Layout) -> Tensor | None:
    """Read a covariance, or the variances of independent elements, from one of three forms."""
    given = {name: value for name, value in spreads.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        refuse(" and ".join(given), "both", f"one of {', '.join(spreads)}")
    ((name, value),) = given.items()
    if name.endswith("scale"):
        scale = read_along(name, value, layout)
        if (scale < 0).any():
            refuse(name, value, "standard deviations, which are not negative")
        return scale.square()
    matrix = read_numbers(name, align_matrix(name, value, layout))
    if matrix.shape != (layout.size, layout.size):
        refuse(name, value, f"a matrix of shape {(layout.size, layout.size)}")
    return _as_covariance(name, matrix) if name.endswith("covariance") else _invert(name, matrix)


def _as_covariance(name: str, matrix: Tensor) -> Tensor:
    """Check that a matrix is symmetric and not negative, up to rounding, and make it symmetric."""
    if (matrix.diagonal() < 0).any():
        index = int(matrix.diagonal().argmin())
        refuse(name, matrix, f"variances that are not negative, as that of element {index} is")
    scale = matrix.diagonal().sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    correlation = inverse[:, None] * matrix * inverse
    symmetric = (matrix + matrix.mT) / 2
    uneven = float((correlation - correlation.mT).abs().max())
    least = float(torch.linalg.eigvalsh((correlation + correlation.mT) / 2)[0])
    fixed = scale == 0
    if uneven > _ROUNDING or least < -_ROUNDING or (matrix[fixed] != 0).any():
        msg = (
            f"got {name} that is no covariance: as correlations, it differs from its transpose by "
            f"up to {uneven:.1g} and has the eigenvalue {least:.1g}. Expected a symmetric matrix "
            "without negative eigenvalues, whose rows are zero where its diagonal is"
        )
        raise ValueError(msg)
    return symmetric


def _invert(name: str, matrix: Tensor) -> Tensor:
    tril, failed = torch.linalg.cholesky_ex(_as_covariance(name, matrix))
    if failed:
        msg = (
            f"got a singular {name}. Expected a positive definite one; a covariance may be singular"
        )
        raise ValueError(msg)
    return torch.cholesky_inverse(tril)
