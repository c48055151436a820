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


def find_lowest(stream: Callable[[], Iterator[Tensor]], count: int) -> Rule:
    """Find the rule by which exactly ``count`` elements go, those with the lowest ΔF.

    The bits of a floating-point number, read as a whole number, are in the order of the numbers:
    each pass over them finds the next digit of the threshold.
    """
    if count == 0:
        return Rule(-torch.inf)
    known, left, bits, dtype = 0, count, 0, torch.float32
    while True:
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for delta_f in stream():
            dtype, size = delta_f.dtype, 8 * delta_f.element_size()
            keys = _to_keys(delta_f)
            # What begins with the digits that are known.
            if bits:
                keys = keys[(keys >> (size - bits)) == known]
            digits = (keys >> (size - bits - _DIGIT)) - (known << _DIGIT)
            offset = 0 if bits else 1 << (_DIGIT - 1)
            histogram += torch.bincount(digits + offset, minlength=1 << _DIGIT)
        upto = histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, left))
        left -= int(upto[digit] - histogram[digit])
        known = (known << _DIGIT) + digit - (0 if bits else 1 << (_DIGIT - 1))
        bits += _DIGIT
        if bits == size:
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
