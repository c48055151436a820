"""How much the fuzz tests try: a few cases by default, all of them with FUZZ=50, as `make fuzz`."""

import os

SCALE = float(os.environ.get("FUZZ", "1"))


def times(count):
    """How often something is tried that is tried `count` times by default."""
    return max(1, round(count * SCALE))
