<<<<<<< HEAD
"""Where the pruned elements of a site are, as plain data."""
=======
"""Centers of sites as plain data."""
>>>>>>> part17h

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_bmr.programs.centers import Center


<<<<<<< HEAD
def pack_center(center: Center | None) -> dict[str, Any] | None:
    """Describe a center; None where coordinates are measured from zero."""
    if center is None:
        return None
    parts = {"offset": center.offset, "at_mean": center.at_mean}
    return {**parts, "weights": dict(center.weights)}


def unpack_center(packed: Mapping[str, Any] | None) -> Center | None:
    """Make the center that `pack_center` described."""
    return None if packed is None else Center(**packed)
=======
def pack_center(center: Center) -> dict[str, Any]:
    """Describe a center."""
    tensors = {"offset": center.offset.contiguous(), "at_mean": center.at_mean.contiguous()}
    return {**tensors, "weights": dict(center.weights)}


def unpack_center(packed: Mapping[str, Any]) -> Center:
    """Make the center that `pack_center` described."""
    return Center(packed["offset"], packed["at_mean"], packed["weights"])
>>>>>>> part17h
