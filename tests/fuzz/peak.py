"""How much memory a test takes."""

import resource


def peak():
    """The most memory that this process has taken so far, in MB; of Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
