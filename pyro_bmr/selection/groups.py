"""Which elements of a posterior live or die together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import read_count, read_names, refuse_kind
from pyro_bmr.display import a_or_an
from pyro_bmr.programs.failures import running
from pyro_bmr.programs.sites import Site

# From the name and the shape of a site to integer labels that broadcast to the shape, or to None
# where every element stands for itself.
Labelling = Callable[[str, torch.Size], Tensor | None]


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
    >>> print(elements("fc1.weight", torch.Size([50, 13])))
    None
    """


@dataclass(frozen=True)
class UnitGrouping:
    """Groups that follow from the model: all that produces or reads one of its units.

    `units`, `channels`, `heads` and `inputs` are the ones there are; call one of them to set its
    options. What has to stay by these, stays whole in that stage; a later one may prune in it.

    Parameters
    ----------
    kinds : tuple of str
        Of layers of the model: ``"unit"``, ``"channel"``, ``"head"`` or ``"input"``.
    at_least, round_to, ignore
        As when it is called.

    Examples
    --------
    >>> units(round_to=8, ignore="fc1").ignore
    ('fc1',)
    """

    kinds: tuple[str, ...]
    at_least: int = 1
    round_to: int = 1
    ignore: tuple[str, ...] = ()

    def __call__(
        self, *, at_least: int = 1, round_to: int = 1, ignore: str | Iterable[str] = ()
    ) -> UnitGrouping:
        """Return the same grouping with options.

        Parameters
        ----------
        at_least : int
            How many units of each layer stay, whatever the evidence says; 0 lets layers vanish.
        round_to : int
            The number of units that stay is rounded up to a multiple of this, to the full size at
            most.
        ignore : str or iterable of str
            Layers that stay whole: names of layers, or of sites that produce them.

        Returns
        -------
        UnitGrouping
            For ``groups=``.

        Raises
        ------
        ValueError
            If a number is not a whole one, or too small.
        """
        expected = "a whole number of units, {} or more, as in groups=units({}=8)"
        least = expected.format(0, "at_least"), expected.format(1, "round_to")
        return replace(
            self,
            at_least=read_count("at_least", at_least, 0, expected=least[0]),
            round_to=read_count("round_to", round_to, 1, expected=least[1]),
            ignore=read_names("ignore", ignore, "names of layers") or (),
        )


units = UnitGrouping(("unit", "channel", "head"))
channels = UnitGrouping(("channel",))
heads = UnitGrouping(("head",))
inputs = UnitGrouping(("input",))

Grouping = Labelling | UnitGrouping


def list_groupings(groups: Grouping | Sequence[Grouping]) -> tuple[Grouping, ...]:
    """Check what a user passed as ``groups=``: one grouping, or several, coarse to fine."""
    listed: tuple[Any, ...] = tuple(groups) if isinstance(groups, list | tuple) else (groups,)
    if not listed:
        msg = "got groups=[]. Expected one grouping or more, as in groups=[units, elements]"
        raise ValueError(msg)
    for one in listed:
        if not callable(one) or isinstance(one, type):
            expected = (
                "pyro_bmr.elements, units, channels, heads or inputs, a function from the name and "
                "the shape of a site to labels, or a list of these, coarse to fine"
            )
            refuse_kind("groups", groups, expected)
    return listed


def read_labels(
    grouping: Labelling, name: str, shape: torch.Size, option: str = "groups"
) -> Tensor | None:
    """Label the elements of a site: int64, of its shape; None if each stands for itself."""
    with running(option, (name, shape), {}, "a function of these two"):
        labels: Any = grouping(name, shape)
    if labels is None:
        return None
    fits = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if fits:
        try:
            return labels.long().expand(shape)
        except RuntimeError:
            pass
    got = (
        f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype}"
        if isinstance(labels, Tensor)
        else a_or_an(labels)
    )
    msg = (
        f"the function in {option}= returned {got} for the site {name!r}. Expected a tensor of "
        f"integers that broadcasts to {tuple(shape)}, or None for a group per element"
    )
    raise ValueError(msg)


def gives_labels(grouping: Grouping, site: Site) -> bool:
    """Tell whether the function of a user puts elements of a site of several into groups."""
    if isinstance(grouping, UnitGrouping) or site.shape.numel() < 2:
        return False
    try:
        labels = read_labels(grouping, site.name, site.shape)
    except Exception:
        # It was written for the sites that are reduced without being named.
        return False
    return labels is not None and bool((labels >= 0).any())
