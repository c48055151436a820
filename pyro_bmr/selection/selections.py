"""What to drop: functions that look at scores and return masks, True for what is kept.

Each of these returns a selection, a function from `pyro_bmr.extend.Scores` to a mask per site; any
function of that kind will do in their place. A site without a mask is kept whole. The masks go into
the reduction as they are, so a selection does not write to them afterwards. Where scores are those
of groups, a group takes the place of an element, and a layer of groups that of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import read_count, read_number, refuse
from pyro_bmr.mathematics.subset_search import search_all, search_best, search_blocks
from pyro_bmr.mathematics.subsets import MOST_ELEMENTS
from pyro_bmr.selection.scores import Scores

Selection = Callable[[Scores], Mapping[str, Tensor]]


def by_evidence(margin: float = 0.0) -> Selection:
    r"""Drop what the evidence says: elements with :math:`\Delta F \le -` ``margin``.

    Independent elements decide each for itself. Sets of correlated ones are searched for the
    lowest joint :math:`\Delta F`, so that of two redundant weights one stays: all sets where a
    posterior has up to 16 elements that can go, as by `exhaustive`, and greedily where it has more.
    So are sets of groups that share elements, as the units of two layers do, or are correlated;
    of these, all sets where that takes less than a second. Independent elements that nothing
    depends on any more go as well, whatever their own :math:`\Delta F` was.

    Parameters
    ----------
    margin : float
        In nats: how much the free energy must fall for each element that goes, so that a group of
        ``n`` elements goes if :math:`\Delta F \le - n` ``margin``. Negative drops also those that
        cost up to that much.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    References
    ----------
    Beckers et al. (2022), arXiv:2210.09134, sec. IV.

    Examples
    --------
    >>> from pyro_bmr.extend import IndependentFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> site, prior = Site("w", torch.Size([3])), Prior(torch.tensor(-0.92))
    >>> loc, scale = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.1, 0.5, 0.5])
    >>> scores = score((IndependentFactor(site, loc, scale, prior=prior),))
    >>> scores.delta_f["w"]
    tensor([-2.3036, -0.1942,  7.3058])
    >>> by_evidence()(scores)["w"], by_evidence(margin=1.0)(scores)["w"]
    (tensor([False, False,  True]), tensor([False,  True,  True]))
    """
    return ByEvidence(read_margin(margin, "by_evidence"))


def exhaustive(margin: float = 0.0) -> Selection:
    r"""Drop the set with the lowest joint :math:`\Delta F` among all sets.

    Independent elements decide each for itself; of a correlated posterior with ``n`` reducible
    elements all :math:`2^n` sets are scored; likewise of groups that share elements or are
    correlated. More than 16 are an error; ``sites=`` can name a part.

    Parameters
    ----------
    margin : float
        In nats, as in `by_evidence`.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    Examples
    --------
    Of two weights that can stand in for each other, one stays:

    >>> from pyro_bmr import Dense
    >>> from pyro_bmr.extend import JointFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> q = Dense(torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.0], [-0.45, 0.1]]))
    >>> sites, priors = (Site("w", torch.Size([2])),), {"w": Prior(torch.tensor(-0.92))}
    >>> scores = score((JointFactor(sites, q, site_priors=priors),))
    >>> scores.delta_f["w"], exhaustive()(scores)["w"]
    (tensor([-0.1942, -0.1872]), tensor([False,  True]))
    """

    def select(scores: Scores) -> Mapping[str, Tensor]:
        return scores.without_unread(scores.search(search_all, margin))

    margin = read_margin(margin, "exhaustive")

    return select


def by_blocks(size: int = 8) -> Selection:
    r"""Drop in blocks, by the rule of SPM, where elements are correlated.

    In each round the candidates are the :math:`m = \max(n / 4, b)` most redundant of the ``n``
    elements that are left: those with the lowest :math:`\Delta F` of their own, given what went
    before. If that leaves others, and all candidates together lower the free energy by more than
    ``m`` nats, they go. Otherwise all subsets of the ``b`` most redundant are scored, and the best
    goes. It ends with the round in which nothing goes. Not for groups.

    It is here to compare with: `by_evidence` finds sets that are as good or better, mostly.

    Parameters
    ----------
    size : int
        :math:`b`, of how many elements all subsets are scored, between 1 and 16; 8 in SPM.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    Raises
    ------
    ValueError
        If ``size`` is not between 1 and 16.

    References
    ----------
    The routine ``spm_dcm_bmr_all`` of SPM, as it is since 2021; the scheme of before, without the
    candidates that go together, is in Friston & Penny (2011), "Post hoc Bayesian model selection",
    NeuroImage 56(4).

    Examples
    --------
    >>> from pyro_bmr import Dense
    >>> from pyro_bmr.extend import JointFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> q = Dense(torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.0], [-0.45, 0.1]]))
    >>> sites, priors = (Site("w", torch.Size([2])),), {"w": Prior(torch.tensor(-0.92))}
    >>> scores = score((JointFactor(sites, q, site_priors=priors),))
    >>> by_blocks()(scores)["w"]
    tensor([False,  True])
    """
    expected = f"of how many elements to score all subsets, between 1 and {MOST_ELEMENTS}"
    size = read_count("size", size, 1, MOST_ELEMENTS, expected)

    def select(scores: Scores) -> Mapping[str, Tensor]:
        return scores.without_unread(scores.search(partial(search_blocks, size=size)))

    return select


def top_k(n: int) -> Selection:
    """Keep the ``n`` elements that the evidence values most, whatever its sign.

    Parameters
    ----------
    n : int
        How many elements of all reducible sites together stay.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    Raises
    ------
    ValueError
        If ``n`` is negative or not an integer.

    Examples
    --------
    >>> from pyro_bmr.extend import IndependentFactor, Prior, Site
    >>> from pyro_bmr.selection.scores import score
    >>> site, prior = Site("w", torch.Size([2])), Prior(torch.tensor(-0.92))
    >>> loc, scale = torch.tensor([0.3, 1.0]), torch.tensor([0.1, 1.0])
    >>> scores = score((IndependentFactor(site, loc, scale, prior=prior),))
    >>> scores.delta_f["w"], top_k(1)(scores)["w"]
    (tensor([2.1964, 0.4989]), tensor([ True, False]))
    """
    check_called(n, "top_k(100)")
    return TopK(
        read_count("n", n, 0, expected="how many elements to keep, as in select=top_k(100)")
    )


@dataclass(frozen=True)
class ByEvidence:
    """See `by_evidence`."""

    margin: float

    def __call__(self, scores: Scores) -> Mapping[str, Tensor]:
        """Return masks."""
        return scores.without_unread(scores.search(search_best, self.margin))


@dataclass(frozen=True)
class TopK:
    """See `top_k`."""

    n: int

    def __call__(self, scores: Scores) -> Mapping[str, Tensor]:
        """Return masks."""
        return drop_lowest(scores, scores.elimination(), max(0, count_items(scores) - self.n))


def read_margin(margin: float, name: str) -> float:
    """Read a number of nats, for the selection of a name."""
    check_called(margin, f"{name}()")
    expected = f"a number of nats, as in select={name}(margin=1.0)"
    return read_number("margin", margin, lambda _: True, expected)


def check_called(option: object, example: str) -> None:
    """Raise a ValueError if a selection was given scores where it has an option."""
    if isinstance(option, Scores):
        refuse("select", option, f"one that was called first, as in select={example}")


def drop_lowest(scores: Scores, importance: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Drop exactly so many: first those pruned before, then in order; never what cannot go."""
    if not importance:
        return {}
    flat = torch.cat(
        [
            torch.where(scores.kept[name], importance[name], -torch.inf)
            .where(~scores.delta_f[name].isposinf(), torch.inf)
            .reshape(-1)
            for name in scores.delta_f
        ]
    )
    count = min(count, int((flat < torch.inf).sum()))
    keep = torch.ones_like(flat, dtype=torch.bool)
    if count:
        last = flat.kthvalue(count).values
        equal = (flat == last).nonzero()[:, 0]
        keep[flat < last] = False
        keep[equal[: count - int((~keep).sum())]] = False
    sizes = [delta_f.numel() for delta_f in scores.delta_f.values()]
    return {
        name: part.reshape(scores.delta_f[name].shape)
        for name, part in zip(scores.delta_f, keep.split(sizes), strict=True)
    }


def count_items(scores: Scores) -> int:
    """Count what there is to drop, with what was pruned before."""
    return sum(delta_f.numel() for delta_f in scores.delta_f.values())
