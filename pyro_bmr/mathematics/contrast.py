r"""Correlated posteriors under correlated priors, and the two meanings of dropping elements there.

.. math:: \Delta F_S = \sum_{i \in S} \bigl[\ln p(\theta_i = 0) + \tfrac12 \ln 2\pi\bigr] + h(S)

Where priors are independent, :math:`h(S) = -\ln q(\theta_S = 0) - \tfrac{|S|}{2} \ln 2\pi`. A joint
prior takes the place of standard normals, of which the sum is 0, and has its say in :math:`h`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmr.mathematics.gaussian import Dense, Diagonal
from pyro_bmr.mathematics.moments import Moments, find_subspace


@dataclass(frozen=True)
class Part:
    r"""A symmetric matrix :math:`T` and a vector :math:`t`, with one row of each element or two.

    It adds :math:`\pm\tfrac12 (\ln |\det T_{SS}| + t_S^\top T_{SS}^{-1} t_S)` to :math:`h(S)`. The
    first rows of all elements come first, then the second ones.
    """

    matrix: Tensor
    edge: Tensor
    sign: float = 1.0

    def split(self, drop: Tensor) -> tuple[Part, Part]:
        """Return the rows of what goes, and those of the rest once it has gone."""
        gone, left = (mask.repeat(len(self.edge) // max(1, len(mask))) for mask in (drop, ~drop))
        columns = torch.cat([self.matrix[gone][:, left], self.edge[gone, None]], -1)
        gain = torch.linalg.solve(self.matrix[gone][:, gone], columns)
        change = self.matrix[left][:, gone] @ gain
        matrix = self.matrix[left][:, left] - change[:, :-1]
        rest = (matrix + matrix.mT) / 2, self.edge[left] - change[:, -1]
        return (
            Part(self.matrix[gone][:, gone], self.edge[gone], self.sign),
            Part(*rest, self.sign),
        )

    def alone(self, size: int) -> Tensor:
        """Return what each of ``size`` elements adds by itself."""
        blocks, edges = element_blocks(self.matrix, self.edge, size)
        return self.sign * block_costs(blocks, edges)

    def of_set(self, drop: Tensor) -> Tensor:
        """Return what a set adds."""
        rows = len(self.edge) // max(1, len(drop))
        gone = drop.repeat(rows)
        count = int(drop.sum()) * (rows - 1)
        return self.sign * block_costs(self.matrix[gone][:, gone], self.edge[gone], count)

    def chain(self, size: int) -> Tensor:
        """Return what each element adds once those before it have gone."""
        matrix, edge = self.matrix.clone(), self.edge.clone()
        costs = edge.new_empty(size)
        for i in range(size):
            rows = torch.arange(i, len(edge), size, device=edge.device)
            block, columns = matrix[rows][:, rows], matrix[rows]
            costs[i] = block_costs(block, edge[rows])
            gain = torch.linalg.solve(block, torch.cat([columns, edge[rows, None]], -1))
            matrix -= columns.mT @ gain[:, :-1]
            edge -= columns.mT @ gain[:, -1]
        return self.sign * costs


def element_blocks(matrix: Tensor, edge: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the block of each of ``size`` elements, ``(n, b, b)``, and its edge, ``(n, b)``."""
    rows = torch.arange(len(edge), device=edge.device).reshape(-1, size).mT
    return matrix[rows[:, :, None], rows[:, None, :]], edge[rows]


def block_costs(blocks: Tensor, edges: Tensor, count: Tensor | int = 1) -> Tensor:
    r"""Return :math:`\tfrac12 (\ln |\det B| + t^\top B^{-1} t)` of each of a batch of blocks.

    ``inf`` where ``count``, that of elements with two rows each, is not that of the negative
    eigenvalues, so that what is left would have no posterior.
    """
    if blocks.shape[-1] == 1:
        pivots = blocks[..., 0, 0]
        return 0.5 * (pivots.abs().log() + edges[..., 0].square() / pivots)
    size, basis = torch.linalg.eigh(blocks)
    along = (basis.mT @ edges[..., None])[..., 0]
    costs = 0.5 * (size.abs().log() + along.square() / size).sum(-1)
    # One eigenvalue of each element is negative, whose dual variable is imaginary.
    proper = (size < 0).sum(-1) == torch.as_tensor(count, device=blocks.device)
    return torch.where(proper & costs.isfinite(), costs, torch.inf)


# Of a correlation matrix, how far below zero rounding may take an eigenvalue.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class Contrast:
    """A correlated posterior and a correlated prior: what ΔF of any set of elements follows from.

    Of the last rows of the first part are the mean and the covariance of the posterior.
    """

    parts: tuple[Part, ...]
    size: int

    @property
    def loc(self) -> Tensor:
        """The posterior mean, of shape ``(n,)``."""
        return self.parts[0].edge[len(self.parts[0].edge) - self.size :]

    @property
    def covariance(self) -> Tensor:
        """The posterior covariance, of shape ``(n, n)``."""
        first = len(self.parts[0].edge) - self.size
        return self.parts[0].matrix[first:, first:]

    @property
    def noise_size(self) -> int:
        """How many standard normals a draw of the posterior needs."""
        return self.size

    def gaussian(self) -> Dense:
        """Return the posterior; a ValueError if there is none."""
        scale = self.covariance.diagonal().abs().sqrt()
        least = torch.linalg.eigvalsh(self.covariance / scale[:, None] / scale)[:1]
        if (self.covariance.diagonal() <= 0).any() or (least < -_ROUNDING).any():
            msg = (
                "what is left has no posterior under its marginal prior, since the posterior is "
                "wider than the prior in some direction. Expected Spike(rest='conditional'), or "
                "that less goes"
            )
            raise ValueError(msg)
        return Moments(self.loc, self.covariance).dense()

    def marginals(self) -> Diagonal:
        """Return the posterior of every element by itself."""
        return Diagonal(self.loc, self.covariance.diagonal().sqrt())

    def split(self, drop: Tensor) -> tuple[Contrast, Contrast]:
        """Return what dropping a set follows from, and what is left once it has gone."""
        gone, left = zip(*(part.split(drop) for part in self.parts), strict=True)
        count = int(drop.sum())
        return Contrast(gone, count), Contrast(left, self.size - count)

    def alone(self) -> Tensor:
        """Return h of each element by itself, of shape ``(n,)``."""
        return torch.stack([part.alone(self.size) for part in self.parts]).sum(0)

    def of_set(self, drop: Tensor) -> Tensor:
        """Return h of a set, boolean of shape ``(n,)``."""
        return torch.stack([part.of_set(drop) for part in self.parts]).sum(0)

    def chain(self) -> Tensor:
        """Return what each element adds to h, in their order, given that those before are zero."""
        return torch.stack([part.chain(self.size) for part in self.parts]).sum(0)


def contrast_conditional(posterior: Moments, prior: Moments) -> Contrast:
    r"""Contrast two Gaussians where what is left has the prior given that the rest is zero.

    :math:`h(S) = \ln p(\theta_S = 0) - \ln q(\theta_S = 0)`: the reduced prior is
    :math:`\delta(\theta_S) \, p(\theta_R \mid \theta_S = 0)`. Source: Dickey (1971), Ann. Math.
    Statist. 42(1).
    """
    q, p = (Part(one.covariance, one.loc) for one in (posterior, prior))
    return Contrast((q, replace(p, sign=-1.0)), len(posterior.loc))


def contrast_marginal(posterior: Moments, prior: Moments, coupled: Tensor) -> Contrast:
    r"""Contrast two Gaussians where what is left keeps its marginal prior.

    The reduced prior is :math:`\delta(\theta_S) \, p(\theta_R)`, SPM's ``R * pC * R``. With the
    likelihood :math:`\exp(h^\top\theta - \tfrac12 \theta^\top P \theta)` and
    :math:`p = N(m, C)`, its integral over what is left is, up to a constant,

    .. math:: \ln Z_R = -\tfrac12 \ln |\det M_{RR}| + \tfrac12 b_R^\top M_{RR}^{-1} b_R, \quad
              M = \begin{pmatrix} -C & I \\ I & P \end{pmatrix}, \quad
              b = \begin{pmatrix} m \\ h \end{pmatrix},

    where each element has a row in both blocks (the dual variable of :math:`\theta = m` integrates
    to the prior); so :math:`h(S) = \ln Z - \ln Z_R` is that of a part with
    :math:`T = M^{-1}` and :math:`t = M^{-1} b`:

    .. math:: T = \begin{pmatrix} \Lambda_0 \Sigma \Lambda_0 - \Lambda_0 & \Lambda_0 \Sigma \\
              \Sigma \Lambda_0 & \Sigma \end{pmatrix}, \quad
              t = \begin{pmatrix} \Lambda_0 (\mu - \mu_0) \\ \mu \end{pmatrix}.

    Where the prior varies on a subspace only, with the orthonormal basis :math:`V`, the likelihood
    is that of the point of it that is closest (as SPM has it), :math:`\Lambda_0` is the
    pseudoinverse, and :math:`I - V V^\top` is added to :math:`\Lambda_0 \Sigma`. ``coupled`` is
    False for elements with an independent prior, which have no say in the first block.
    """
    covariance, loc = posterior.covariance, posterior.loc
    basis = find_subspace(prior.covariance)
    inner = torch.linalg.inv(basis.mT @ prior.covariance @ basis)
    precision = basis @ ((inner + inner.mT) / 2) @ basis.mT
    outside = torch.eye(len(loc), dtype=loc.dtype, device=loc.device) - basis @ basis.mT
    gain = precision @ covariance
    own = gain @ precision - precision
    gain = gain + outside
    outer = coupled[:, None] & coupled
    own = torch.where(outer, own, -torch.eye(len(loc), dtype=loc.dtype, device=loc.device))
    gain = torch.where(coupled[:, None], gain, 0)
    matrix = torch.cat([torch.cat([own, gain], -1), torch.cat([gain.mT, covariance], -1)])
    slope = torch.where(coupled, precision @ (loc - prior.loc), 0)
    return Contrast((Part((matrix + matrix.mT) / 2, torch.cat([slope, loc])),), len(loc))
