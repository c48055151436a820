"""Which elements of a posterior live or die together."""

from __future__ import annotations

import torch


def elements(name: str, shape: torch.Size) -> None:  # noqa: ARG001
    """Let every element stand for itself.

    Parameters
    ----------
    name : str
        A sample site.
    shape : torch.Size
        Its shape.

    Examples
    --------
    >>> elements("fc1.weight", torch.Size([50, 13]))
    """
