"""Evidence of every subset of a few correlated elements, in one vectorised pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, refuse, refuse_kind
from pyro_bmr.mathematics.contrast import Contrast, Part, block_costs
from pyro_bmr.mathematics.evidence import Correlated
from pyro_bmr.mathematics.gaussian import LOG_2PI, Dense, LowRank
from pyro_bmr.mathematics.singular_contrast import SingularContrast

# With so many elements there are 65,536 subsets.
MOST_ELEMENTS = 16


def delta_f_of_all_subsets(posterior: Correlated, log_prior: Tensor) -> Tensor:
    r"""Score the joint removal of every subset of the elements of a correlated posterior.

    .. math:: \Delta F_S = \sum_{i \in S} \ln p(\theta_i = 0) - \ln q(\theta_S = 0)
              = \sum_{i \in S} \bigl[\ln p(\theta_i = 0)
              - \ln q(\theta_i = 0 \mid \theta_j = 0,\ j \in S,\ j < i)\bigr]

    Subsets that agree on the first elements share the work: the pass goes through the elements
    once, and each doubles the number of subsets, into those without it, where the later elements
    stay as they are, and those with it, where they are conditioned on it. In all that is
    :math:`O(n 2^n)`, in time and in memory.

    Parameters
    ----------
    posterior : Dense or LowRank
        Posterior of ``n <= 16`` elements; computed in float64.
    log_prior : Tensor
        :math:`\ln p(\theta_i = 0)` in nats, of shape ``(n,)``; ``inf`` for an element that stays.

    Returns
    -------
    Tensor
        :math:`\Delta F` in nats and float64, of shape ``(2**n,)``. Bit ``i`` of the index is set
        where element ``i`` is dropped; ``subset_members`` reads the bits.

    Raises
    ------
    ValueError
        If there are more than 16 elements.

    References
    ----------
    Dickey (1971), Ann. Math. Statist. 42(1); Friston & Penny (2011), "Post hoc Bayesian model
    selection", NeuroImage 56(4), who search all subsets of the most redundant elements.

    Examples
    --------
    >>> twins = Dense(torch.ones(2), torch.tensor([[1.0, 0.0], [-0.99, 0.1411]]))
    >>> delta_f_of_all_subsets(twins, torch.tensor([-1.0, -1.0]))
    tensor([ 0.0000,  0.4189,  0.4189, 97.8336], dtype=torch.float64)
    """
    kinds = (Dense, LowRank, Contrast, SingularContrast)
    check_kind("posterior", posterior, kinds, "a Dense or a LowRank Gaussian")
    size = len(posterior.loc)
    if not isinstance(log_prior, Tensor) or log_prior.layout is not torch.strided:
        refuse_kind("log_prior", log_prior, f"a tensor of {size} log densities")
    if log_prior.shape != (size,):
        refuse("log_prior", log_prior, f"a tensor of {size} log densities")
    count = len(log_prior)
    if count > MOST_ELEMENTS:
        msg = (
            f"got {count} elements, which have 2^{count} subsets. Expected at most "
            f"{MOST_ELEMENTS}: search by pyro_bmr.by_evidence, or enumerate the subsets of a part"
        )
        raise ValueError(msg)
    exact = posterior.to(torch.float64) if isinstance(posterior, Dense | LowRank) else posterior
    shift = log_prior.to(exact.loc) + 0.5 * LOG_2PI
    index = torch.arange(1 << count, device=shift.device)
    # An element that stays has the shift inf, and inf · 0 would not be 0.
    parts = torch.where(subset_members(index, count), shift, 0).sum(-1)
    return parts + _H[type(exact)](exact)


def subset_members(index: Tensor, count: int) -> Tensor:
    """Tell which of ``count`` elements the subsets at ``index`` drop, ``(*index.shape, count)``."""
    bits = torch.arange(count, device=index.device)
    return (index[..., None] >> bits) & 1 == 1


def _of_gaussian(posterior: Dense | LowRank) -> Tensor:
    # By subset of the elements so far: h, and mean and rows of a root of the covariance of those
    # ahead. Conditioning takes from each row its part along the row of the dropped element, which
    # never squares the root; that matters when columns are nearly collinear.
    h = posterior.loc.new_zeros(1)
    loc, rows = posterior.loc[None], posterior.root()[None]
    for _ in range(len(posterior.loc)):
        scale = torch.linalg.vector_norm(rows[:, 0], dim=-1)
        whitened = loc[:, 0] / scale
        h = torch.cat([h, h + scale.log() + 0.5 * whitened.square()])
        along = rows[:, 0] / scale[:, None]
        loc, rows = loc[:, 1:], rows[:, 1:]
        overlap = (rows @ along[:, :, None])[..., 0]
        loc = torch.cat([loc, loc - overlap * whitened[:, None]])
        rows = torch.cat([rows, rows - overlap[..., None] * along[:, None]])
    return h


def _of_contrast(contrast: Contrast) -> Tensor:
    return torch.stack([_of_part(part, contrast.size) for part in contrast.parts]).sum(0)


def _of_part(part: Part, size: int) -> Tensor:
    # As above, with the rows of an element as a block, and the others' given that it is zero.
    h = part.edge.new_zeros(1)
    matrix, edge = part.matrix[None], part.edge[None]
    for left in range(size, 0, -1):
        ahead = torch.arange(edge.shape[-1], device=edge.device) % left > 0
        block, along = matrix[:, ~ahead][:, :, ~ahead], matrix[:, ~ahead][:, :, ahead]
        h = torch.cat([h, h + block_costs(block, edge[:, ~ahead])])
        gain = torch.linalg.solve(block, along)
        matrix, edge, gone = matrix[:, ahead][:, :, ahead], edge[:, ahead], edge[:, ~ahead]
        edge = torch.cat([edge, edge - (gain.mT @ gone[..., None])[..., 0]])
        matrix = torch.cat([matrix, matrix - along.mT @ gain])
    return part.sign * h


def _of_singular(contrast: SingularContrast) -> Tensor:
    index = torch.arange(1 << contrast.size, device=contrast.loc.device)
    return contrast.of_sets(subset_members(index, contrast.size))


_H: dict[type, Callable[..., Tensor]] = {
    Dense: _of_gaussian,
    LowRank: _of_gaussian,
    Contrast: _of_contrast,
    SingularContrast: _of_singular,
}
