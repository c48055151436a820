"""Parameters of tests, of which some are tried each time, and all before a release."""

from collections.abc import Iterable
from typing import Any

import pytest


def often(values: Iterable[Any], *tried: Any) -> list[Any]:
    """Return them, with all that are not named marked as rare."""
    return [v if v in tried else pytest.param(v, marks=pytest.mark.rare) for v in values]
