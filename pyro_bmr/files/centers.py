"""Where the pruned elements of a site are, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_bmr.programs.centers import Center


def pack_center(center: Center | None) -> dict[str, Any] | None:
    """Describe a center; None where coordinates are measured from zero."""
    if center is None:
        return None
    parts = {"offset": center.offset, "at_mean": center.at_mean}
    return {**parts, "weights": dict(center.weights)}


def unpack_center(packed: Mapping[str, Any] | None) -> Center | None:
    """Make the center that `pack_center` described."""
    return None if packed is None else Center(**packed)
