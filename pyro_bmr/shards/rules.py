"""Which elements go, as a number that their ΔF is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Bits of a number that are told apart in one pass.
_DIGIT = 16


@dataclass(frozen=True)
class Rule:
    """What is below a threshold goes, and the first so many that are equal to it."""

    threshold: float
    ties: float = torch.inf

    def apply(self, delta_f: Tensor) -> tuple[Tensor, Rule]:
        """Return a mask, True where an element stays, and the rule for what comes next."""
        equal = delta_f == self.threshold
        tied = equal & (equal.cumsum(0) <= self.ties)
        kept = (delta_f >= self.threshold) & ~tied
        return kept, replace(self, ties=self.ties - int(tied.sum()))


def count_passes(dtype: torch.dtype) -> int:
    """Return how often `find_lowest` looks at all numbers."""
    return 8 * dtype.itemsize // _DIGIT


def find_lowest(stream: Callable[[], Iterator[Tensor]], count: int, dtype: torch.dtype) -> Rule:
    """Find the rule by which exactly ``count`` elements go, those with the lowest ΔF.

    The bits of a floating-point number, read as a whole number, are in the order of the numbers:
    each pass over them finds the next digit of the threshold.
    """
    if count == 0:
        return Rule(-torch.inf)
    known, left = 0, count
    for number in range(count_passes(dtype)):
        # The first digit has the sign.
        lowest = 0 if number else -(1 << (_DIGIT - 1))
        rest = 8 * dtype.itemsize - _DIGIT * (number + 1)
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for delta_f in stream():
            keys = _to_keys(delta_f) >> rest
            # What begins with the digits that are known.
            if number:
                keys = keys[(keys >> _DIGIT) == known]
            digits = keys - (known << _DIGIT) - lowest
            histogram += torch.bincount(digits, minlength=1 << _DIGIT)
        upto = histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, left))
        left -= int(upto[digit] - histogram[digit])
        known = (known << _DIGIT) + digit + lowest
    threshold = _from_key(known, dtype)
    # What cannot go never does, even if that leaves more than was asked for.
    return Rule(threshold, left if threshold < torch.inf else 0)


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _to_keys(values: Tensor) -> Tensor:
    """Map numbers to whole numbers in the same order; 0 and -0 to one."""
    bits = (values + 0.0).view(_INTEGERS[values.dtype])
    most = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ most, bits).long()


def _from_key(key: int, dtype: torch.dtype) -> float:
    integer = _INTEGERS[dtype]
    bits = key if key >= 0 else key ^ torch.iinfo(integer).max
    return float(torch.tensor(bits, dtype=integer, device="cpu").view(dtype))
