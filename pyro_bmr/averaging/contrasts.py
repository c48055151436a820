"""Linear combinations of elements of an average: which they are, and how they are distributed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, refuse
from pyro_bmr.averaging.element_names import ElementNames
from pyro_bmr.averaging.model_space import BATCHES, ratio_of_sums
from pyro_bmr.averaging.subset_sampling import CHAINS
from pyro_bmr.mathematics.normal_mixtures import tail
from pyro_bmr.moments.names import read_numbers


class Probability(NamedTuple):
    """A probability, and its Monte Carlo standard error, 0 where it is exact.

    Parameters
    ----------
    value : float
        Between 0 and 1.
    standard_error : float
        Of the value.

    Examples
    --------
    >>> Probability(0.97, 0.0).value
    0.97
    """

    value: float
    standard_error: float


def read_contrast(contrast: Any, names: ElementNames, device: torch.device) -> dict[str, Tensor]:
    """Read coefficients by site, element or pattern, ``{"w[0,2]": 1.0}``; in shapes of sites."""
    expected = 'coefficients by site or element, such as {"w[0]": 1.0, "w[1]": -1.0}'
    check_kind("contrast", contrast, Mapping, expected)
    if not contrast:
        refuse("contrast", contrast, expected)
    whole = torch.zeros(names.layout.size, dtype=torch.float64, device=device)
    named = torch.zeros_like(whole, dtype=torch.bool)
    for key, value in contrast.items():
        place = f"contrast[{key!r}]"
        part = read_numbers(place, value).to(device)
        where, shape = names.locate(place, key)
        try:
            whole[where] += part.expand(shape).reshape(-1)
        except RuntimeError:
            refuse(place, value, f"what fits {key!r} of shape {tuple(shape)}")
        named[where] = True
    coefficients, held = names.layout.split(whole), names.layout.split(named)
    return {name: one for name, one in coefficients.items() if held[name].any()}


@dataclass(frozen=True)
class WeightedNormals:
    """The distribution of a sum: normals and point masses with weights, all ``(models,)``.

    ``batch`` tells of which batch of a walk each is; None if there is no Monte Carlo error.
    """

    weight: Tensor
    loc: Tensor
    scale: Tensor
    batch: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weight)

    def probability(self, above: float) -> Probability:
        """Return P(x > above)."""
        each = self.weight * tail(self.loc, self.scale, above)
        if self.batch is None:
            return Probability(float(each.sum().clamp(0.0, 1.0)), 0.0)
        weight, total = each.new_zeros(2, CHAINS * BATCHES).unbind()
        weight.index_add_(0, self.batch, self.weight)
        total.index_add_(0, self.batch, each)
        mean, error = ratio_of_sums(weight, total[:, None])
        return Probability(float(mean.clamp(0.0, 1.0)), float(error))


def add_up(parts: Iterable[WeightedNormals], generator: torch.Generator) -> WeightedNormals:
    """Return the distribution of a sum of independent parts.

    Where the parts together have too many components, it is a mixture of draws of these, of which
    each remains a normal, in as many batches as a walk has.
    """  # noqa: DOC201
    exact, sampled = None, []
    for part in sorted(parts, key=len):
        small = exact is None or len(exact) * len(part) <= _MOST
        if part.batch is None and small:
            exact = part if exact is None else _outer(exact, part)
        else:
            sampled.append(part)
    if len(sampled) == 1 and (exact is None or len(exact) * len(sampled[0]) <= _MOST):
        return sampled[0] if exact is None else _outer(sampled[0], exact)
    if not sampled and exact is not None:
        return exact
    return _draw([*sampled, *([] if exact is None else [exact])], generator)


# WeightedNormals of a sum, and draws of a batch where there are more.
_MOST, _DRAWS = 1 << 21, 500


def _outer(one: WeightedNormals, two: WeightedNormals) -> WeightedNormals:
    variance = one.scale.square()[:, None] + two.scale.square()
    return WeightedNormals(
        (one.weight[:, None] * two.weight).reshape(-1),
        (one.loc[:, None] + two.loc).reshape(-1),
        variance.sqrt().reshape(-1),
        None if one.batch is None else one.batch.repeat_interleave(len(two)),
    )


def _draw(parts: list[WeightedNormals], generator: torch.Generator) -> WeightedNormals:
    batches = []
    for batch in range(CHAINS * BATCHES):
        weight = parts[0].weight.new_ones(_DRAWS) / _DRAWS
        loc, variance = torch.zeros_like(weight), torch.zeros_like(weight)
        for part in parts:
            mine = part.weight if part.batch is None else part.weight * (part.batch == batch)
            index = torch.multinomial(mine, _DRAWS, True, generator=generator)
            weight = weight * mine.sum()
            loc, variance = loc + part.loc[index], variance + part.scale[index].square()
        which = torch.full_like(index, batch)
        batches.append(WeightedNormals(weight, loc, variance.sqrt(), which))
    columns = zip(*((b.weight, b.loc, b.scale, b.batch) for b in batches), strict=True)
    weight, loc, scale, which = (torch.cat(column) for column in columns)
    return WeightedNormals(weight / weight.sum(), loc, scale, which)
