"""Whether what is predicted with a probability comes true that often."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_BINS = 15


def bin_confidences(probabilities: Tensor, classes: Tensor, num_bins: int = _BINS) -> pd.DataFrame:
    """Count how often the most probable class is right, by its probability.

    ``probabilities`` are ``(n, K)``, ``classes`` ``(n,)``. One row per bin of equal width; an empty
    one has its centre for ``confidence`` and the ``accuracy`` 0.
    Source: Guo et al. (2017), "On calibration of modern neural networks", arXiv:1706.04599.
    """
    import pandas as pd

    bins, confidence, right = _bin(probabilities, classes, num_bins)
    counts = torch.bincount(bins, minlength=num_bins)
    sums = (
        torch.zeros(num_bins, device="cpu").double().index_add_(0, bins, values)
        for values in (confidence, right)
    )
    mean_confidence, accuracy = (total / counts.clamp(min=1) for total in sums)
    centre = (torch.arange(num_bins, device="cpu").double() + 0.5) / num_bins
    return pd.DataFrame(
        {
            "confidence": torch.where(counts > 0, mean_confidence, centre).numpy(),
            "accuracy": accuracy.numpy(),
            "count": counts.numpy(),
        }
    )


def calibration_error(
    probabilities: Tensor, classes: Tensor, num_bins: int = _BINS, resamples: int = 0
) -> Tensor:
    r"""Return the expected calibration error, in float64: of the rows, then of each resample.

    .. math:: ECE = \sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|

    It grows where bins hold few rows, which the bootstrap does not see. Source: Guo et al., eq. 3.
    """
    bins, confidence, right = _bin(probabilities, classes, num_bins)
    gap, size = right - confidence, len(right)
    generator = torch.Generator(device="cpu").manual_seed(0)
    errors = []
    for i in range(1 + resamples):
        rows = torch.arange(size, device="cpu")
        if i:
            rows = torch.randint(size, (size,), generator=generator, device="cpu")
        sums = torch.zeros(num_bins, device="cpu").double().index_add_(0, bins[rows], gap[rows])
        errors.append(sums.abs().sum() / size)
    return torch.stack(errors)


def _bin(probabilities: Tensor, classes: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    confidence, guess = probabilities.detach().cpu().double().max(-1)
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    return bins, confidence, (guess == classes.cpu()).double()
