"""Other criteria than the evidence: the baselines of Beckers et al. (2022), arXiv:2210.09134.

Each is a selection, for ``select=`` of `pyro_bmr.reduce`, that drops a given fraction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import read_number, read_seed
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.selections import Selection, check_called, count_items, drop_lowest

__all__ = ["magnitude", "random", "snr", "spr"]


def snr(fraction: float) -> Selection:
    r"""Drop the elements with the lowest signal-to-noise ratio :math:`|\mu| / \sigma`.

    Parameters
    ----------
    fraction : float
        Of the elements of all reducible sites together, which part goes.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    References
    ----------
    Blundell et al. (2015), arXiv:1505.05424, sec. 5.1.

    Examples
    --------
    >>> from pyro_bmr.extend import IndependentFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> site, prior = Site("w", torch.Size([2])), Prior(torch.tensor(-0.92))
    >>> loc, scale = torch.tensor([0.3, 1.0]), torch.tensor([0.1, 1.0])
    >>> scores = score((IndependentFactor(site, loc, scale, prior=prior),))
    >>> snr(0.5)(scores)["w"]
    tensor([ True, False])
    """
    return _lowest(fraction, lambda loc, scale: loc.abs() / scale)


def spr(fraction: float) -> Selection:
    r"""Drop the elements with the lowest signal plus robustness :math:`|\mu| + \sigma`.

    Parameters
    ----------
    fraction : float
        Of the elements of all reducible sites together, which part goes.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    References
    ----------
    Beckers et al. (2022), arXiv:2210.09134, who compare with it.

    Examples
    --------
    >>> from pyro_bmr.extend import IndependentFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> site, prior = Site("w", torch.Size([2])), Prior(torch.tensor(-0.92))
    >>> loc, scale = torch.tensor([0.3, 1.0]), torch.tensor([0.1, 1.0])
    >>> scores = score((IndependentFactor(site, loc, scale, prior=prior),))
    >>> spr(0.5)(scores)["w"]
    tensor([False,  True])
    """
    return _lowest(fraction, lambda loc, scale: loc.abs() + scale)


def magnitude(fraction: float) -> Selection:
    r"""Drop the elements with the smallest posterior mean :math:`|\mu|`.

    Parameters
    ----------
    fraction : float
        Of the elements of all reducible sites together, which part goes.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    Examples
    --------
    >>> from pyro_bmr.extend import IndependentFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> site, prior = Site("w", torch.Size([2])), Prior(torch.tensor(-0.92))
    >>> loc, scale = torch.tensor([0.3, 1.0]), torch.tensor([0.1, 1.0])
    >>> scores = score((IndependentFactor(site, loc, scale, prior=prior),))
    >>> magnitude(0.5)(scores)["w"]
    tensor([False,  True])
    """
    return _lowest(fraction, lambda loc, _scale: loc.abs())


def random(fraction: float, seed: int = 0) -> Selection:
    """Drop elements at random, without touching the global random number generators.

    Parameters
    ----------
    fraction : float
        Of the elements of all reducible sites together, which part goes.
    seed : int
        The same seed drops the same elements.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    Examples
    --------
    >>> from pyro_bmr.extend import IndependentFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> site, prior = Site("w", torch.Size([2])), Prior(torch.tensor(-0.92))
    >>> loc, scale = torch.tensor([0.3, 1.0]), torch.tensor([0.1, 1.0])
    >>> scores = score((IndependentFactor(site, loc, scale, prior=prior),))
    >>> random(0.5, seed=1)(scores)["w"]
    tensor([ True, False])
    """

    def select(scores: Scores) -> dict[str, Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        importance = {
            name: torch.rand(t.shape, generator=generator, device="cpu").to(t.device)
            for name, t in scores.delta_f.items()
        }
        return drop_lowest(scores, importance, _count(fraction, scores))

    fraction, seed = _read_fraction(fraction), read_seed(seed)
    return select


def _lowest(fraction: float, importance: Callable[[Tensor, Tensor], Tensor]) -> Selection:
    fraction = _read_fraction(fraction)

    def select(scores: Scores) -> dict[str, Tensor]:
        by_site = {n: importance(scores.loc[n], scores.scale[n]) for n in scores.delta_f}
        return drop_lowest(scores, by_site, _count(fraction, scores))

    return select


def _read_fraction(fraction: float) -> float:
    check_called(fraction, "snr(0.5)")
    expected = "the part that goes, between 0 and 1, as in select=snr(0.5)"
    return read_number("fraction", fraction, lambda part: 0 <= part <= 1, expected)


def _count(fraction: float, scores: Scores) -> int:
    return round(fraction * count_items(scores))


def __dir__() -> list[str]:
    return __all__
