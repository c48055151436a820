"""How much the fuzz tests try: a few cases by default, 56 times as many by `make fuzz`.

FUZZ_SEED, 0 by default, makes others.
"""

import os
from random import Random

SCALE = float(os.environ.get("FUZZ", "1"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


def times(count):
    """How often something is tried that is tried `count` times by default."""
    return max(1, round(count * SCALE))


def random_source(what):
    """Return random numbers of their own for what is tried."""
    return Random(f"{what} {SEED}")
