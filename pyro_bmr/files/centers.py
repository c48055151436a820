"""Centers of sites as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_bmr.programs.centers import Center


def pack_center(center: Center) -> dict[str, Any]:
    """Describe a center."""
    tensors = {"offset": center.offset.contiguous(), "at_mean": center.at_mean.contiguous()}
    return {**tensors, "weights": dict(center.weights)}


def unpack_center(packed: Mapping[str, Any]) -> Center:
    """Make the center that `pack_center` described."""
    return Center(packed["offset"], packed["at_mean"], packed["weights"])
