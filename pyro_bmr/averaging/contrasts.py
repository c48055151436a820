"""Linear combinations of elements of an average: which they are, and how they are distributed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, refuse
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


def read_contrast(
    contrast: Any, shapes: Mapping[str, torch.Size], device: torch.device
) -> dict[str, Tensor]:
    """Read coefficients by site, or by element as in ``{"w[0,2]": 1.0}``; in shapes of sites."""
    expected = 'coefficients by site or element, such as {"w[0]": 1.0, "w[1]": -1.0}'
    check_kind("contrast", contrast, Mapping, expected)
    found: dict[str, Tensor] = {}
    for key, value in contrast.items():
        name, index = _read_key(key, shapes)
        part = read_numbers(f"contrast[{key!r}]", value).to(device)
        full = found.setdefault(name, torch.zeros(shapes[name], dtype=torch.float64, device=device))
        try:
            full[index] += part.expand(full[index].shape)
        except (RuntimeError, IndexError):
            refuse(
                f"contrast[{key!r}]", value, f"what fits {name!r} of shape {tuple(shapes[name])}"
            )
    if not found:
        refuse("contrast", contrast, expected)
    return found


def _read_key(key: Any, shapes: Mapping[str, torch.Size]) -> tuple[str, tuple[Any, ...]]:
    if key in shapes:
        return key, (...,)
    match = re.fullmatch(r"(.+)\[(-?\d+(?:, ?-?\d+)*)\]", key) if isinstance(key, str) else None
    if match is None or match[1] not in shapes:
        refuse("contrast", key, f"names of sites, or of elements as 'w[0]', of {sorted(shapes)}")
    return match[1], tuple(int(i) for i in match[2].split(","))


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
