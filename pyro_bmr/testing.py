"""Laws that extensions obey, for use in tests."""

from __future__ import annotations

from typing import Any

import torch

from pyro_bmr.guides import read_guide, read_origin
from pyro_bmr.pruned_guide import PrunedGuide


def check_guide_family(guide: Any) -> None:
    """Check that reading what was written gives back what was read, and leaves the guide alone.

    Parameters
    ----------
    guide : callable
        A guide of a family that is registered with `pyro_bmr.read_factors`; called at least once.

    Raises
    ------
    AssertionError
        If a site, a location or a scale changes on the way, or the guide itself does.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    >>> _ = guide()
    >>> check_guide_family(guide)
    """
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    factors = read_guide(guide)
    again = read_guide(PrunedGuide(factors, read_origin(guide)))
    if len(again) != len(factors):
        msg = f"{len(factors)} factors were written and {len(again)} were read"
        raise AssertionError(msg)
    for first, second in zip(factors, again, strict=True):
        if first.sites != second.sites:
            msg = f"sites {first.sites} were written and {second.sites} were read"
            raise AssertionError(msg)
        marginals = second.marginals()
        for name, marginal in first.marginals().items():
            torch.testing.assert_close(marginals[name].loc, marginal.loc)
            torch.testing.assert_close(marginals[name].scale, marginal.scale)
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
