"""Gaussians over vectors of weights: moments, natural parameters, marginals and conditionals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Diagonal:
    r"""Independent Gaussians, one per element: :math:`N(\mu_i, \sigma_i^2)`.

    Parameters
    ----------
    loc : Tensor
        Means, of any shape.
    scale : Tensor
        Standard deviations, of the same shape. Zero is a point mass.

    Examples
    --------
    >>> Diagonal(torch.zeros(2), torch.ones(2)).natural().log_partition()
    tensor([0.9189, 0.9189], dtype=torch.float64)
    """

    loc: Tensor
    scale: Tensor

    def natural(self) -> Natural:
        """Return the natural parameters, in float64.

        Returns
        -------
        Natural
            One pair of natural parameters per element.
        """
        precision = self.scale.double().pow(-2)
        return Natural(precision * self.loc.double(), precision)


def triangular(root: Tensor) -> Tensor:
    """Return the lower Cholesky factor of ``root @ root.mT``, of no more rows than columns.

    Orthogonalising the rows never squares the root, which matters when they are nearly collinear.
    """  # noqa: DOC201
    upper = torch.linalg.qr(root.mT, mode="r").R
    return torch.where(upper.diagonal()[:, None] < 0, -upper, upper).mT


@dataclass(frozen=True)
class Dense:
    r"""A joint Gaussian :math:`N(\mu, L L^\top)` over a vector.

    Parameters
    ----------
    loc : Tensor
        Mean, of shape ``(n,)``.
    scale_tril : Tensor
        Lower Cholesky factor of the covariance, of shape ``(n, n)``: not the covariance, of which
        it is ``torch.linalg.cholesky(covariance)``. `delta_f` and `reduced_posterior` refuse
        another.

    Examples
    --------
    >>> q = Dense(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    >>> q.split(torch.tensor([True, False]))[1].loc
    tensor([1.5000])
    """

    loc: Tensor
    scale_tril: Tensor

    def to(self, dtype: torch.dtype) -> Dense:
        """Convert to a floating-point type.

        Parameters
        ----------
        dtype : torch.dtype
            The type.

        Returns
        -------
        Dense
            The same Gaussian.
        """
        return Dense(self.loc.to(dtype), self.scale_tril.to(dtype))

    @property
    def covariance(self) -> Tensor:
        r""":math:`\Sigma = L L^\top`, of shape ``(n, n)``."""
        return self.scale_tril @ self.scale_tril.mT

    def root(self) -> Tensor:
        r"""Return a matrix :math:`R` with :math:`\Sigma = R R^\top`.

        Returns
        -------
        Tensor
            Of shape ``(n, n)``.
        """
        return self.scale_tril

    @property
    def noise_size(self) -> int:
        """How many standard normals `transform` needs."""
        return len(self.loc)

    def transform(self, noise: Tensor) -> Tensor:
        """Turn standard normals into draws.

        Parameters
        ----------
        noise : Tensor
            At least ``noise_size`` of them in the last dimension; the first ones are used.

        Returns
        -------
        Tensor
            Of shape ``(..., n)``.
        """
        return self.loc + noise[..., : len(self.loc)] @ self.scale_tril.mT

    def marginals(self) -> Diagonal:
        """Return the marginal of every element by itself.

        Returns
        -------
        Diagonal
            Means and standard deviations, of shape ``(n,)``.
        """
        return Diagonal(self.loc, self.scale_tril.square().sum(-1).sqrt())

    def natural(self) -> Natural:
        """Return the natural parameters, in float64.

        Returns
        -------
        Natural
            A vector and a precision matrix.
        """
        precision = torch.cholesky_inverse(self.scale_tril.double())
        return Natural(precision @ self.loc.double(), precision)

    def ordered(self, order: Tensor) -> Tensor:
        """Return the Cholesky factor of the covariance with the elements in another order.

        Parameters
        ----------
        order : Tensor
            Positions, of shape ``(n,)``.

        Returns
        -------
        Tensor
            Lower, of shape ``(n, n)``.
        """
        return triangular(self.scale_tril[order])

    def split(self, drop: Tensor) -> tuple[Dense, Dense]:
        r"""Factor the joint into the marginal of a set and the conditional of the rest.

        :math:`q(\theta) = q(\theta_S) \, q(\theta_R \mid \theta_S)`, and the second factor is
        returned at :math:`\theta_S = 0`: mean
        :math:`\mu_R - \Sigma_{RS} \Sigma_{SS}^{-1} \mu_S`, covariance
        :math:`\Sigma_{RR} - \Sigma_{RS} \Sigma_{SS}^{-1} \Sigma_{SR}`.

        Parameters
        ----------
        drop : Tensor
            Boolean, of shape ``(n,)``; True for the elements of :math:`S`.

        Returns
        -------
        tuple of Dense
            The marginal of :math:`S` and the conditional of the rest, each in the order of the
            joint.
        """
        # With S in front, the Cholesky factor of the covariance is [[A, 0], [B, C]]: A belongs to
        # the marginal of S, and C to the conditional of the rest, for Σ_RR − B Bᵀ = C Cᵀ and
        # Σ_RS Σ_SS⁻¹ = B A⁻¹.
        order = torch.cat([drop.nonzero()[:, 0], (~drop).nonzero()[:, 0]])
        tril = self.ordered(order)
        size = int(drop.sum())
        loc = self.loc[order]
        whitened = torch.linalg.solve_triangular(tril[:size, :size], loc[:size, None], upper=False)[
            :, 0
        ]
        return (
            Dense(loc[:size], tril[:size, :size]),
            Dense(loc[size:] - tril[size:, :size] @ whitened, tril[size:, size:]),
        )


@dataclass(frozen=True)
class LowRank:
    r"""A joint Gaussian :math:`N(\mu, W W^\top + \operatorname{diag}(d))` over a vector.

    The matrix of all covariances is never formed: the elements are independent given
    :math:`k` latent standard normals :math:`z`, with :math:`\theta = \mu + W z + \sqrt d \epsilon`.

    Parameters
    ----------
    loc : Tensor
        Mean, of shape ``(n,)``.
    cov_factor : Tensor
        :math:`W`, of shape ``(n, k)``.
    cov_diag : Tensor
        :math:`d`, of shape ``(n,)``; positive.

    Examples
    --------
    >>> q = LowRank(torch.tensor([1.0, 2.0]), torch.ones(2, 1), torch.ones(2))
    >>> q.split(torch.tensor([True, False]))[1].loc
    tensor([1.5000])
    """

    loc: Tensor
    cov_factor: Tensor
    cov_diag: Tensor

    def to(self, dtype: torch.dtype) -> LowRank:
        """Convert to a floating-point type.

        Parameters
        ----------
        dtype : torch.dtype
            The type.

        Returns
        -------
        LowRank
            The same Gaussian.
        """
        return LowRank(*(t.to(dtype) for t in (self.loc, self.cov_factor, self.cov_diag)))

    def root(self) -> Tensor:
        r"""Return a matrix :math:`R` with :math:`\Sigma = R R^\top`.

        Returns
        -------
        Tensor
            Of shape ``(n, k + n)``.
        """
        return torch.cat([self.cov_factor, self.cov_diag.sqrt().diag()], dim=-1)

    @property
    def noise_size(self) -> int:
        """How many standard normals `transform` needs."""
        return self.cov_factor.shape[-1] + len(self.loc)

    def transform(self, noise: Tensor) -> Tensor:
        """Turn standard normals into draws.

        Parameters
        ----------
        noise : Tensor
            At least ``noise_size`` of them in the last dimension; the first ones are used.

        Returns
        -------
        Tensor
            Of shape ``(..., n)``.
        """
        rank = self.cov_factor.shape[-1]
        latent, own = noise[..., :rank], noise[..., rank : rank + len(self.loc)]
        return self.loc + latent @ self.cov_factor.mT + own * self.cov_diag.sqrt()

    def marginals(self) -> Diagonal:
        """Return the marginal of every element by itself.

        Returns
        -------
        Diagonal
            Means and standard deviations, of shape ``(n,)``.
        """
        return Diagonal(self.loc, (self.cov_diag + self.cov_factor.square().sum(-1)).sqrt())

    def select(self, index: Tensor) -> LowRank:
        """Return the marginal of some elements.

        Parameters
        ----------
        index : Tensor
            Their positions, or a mask that is True for them.

        Returns
        -------
        LowRank
            In the order of ``index``.
        """
        return LowRank(self.loc[index], self.cov_factor[index], self.cov_diag[index])

    def dense(self) -> Dense:
        """Return the same Gaussian with all its covariances.

        Returns
        -------
        Dense
            Of ``n * n`` numbers.
        """
        covariance = self.cov_factor @ self.cov_factor.mT + self.cov_diag.diag()
        return Dense(self.loc, torch.linalg.cholesky(covariance))

    def at_zero(self, drop: Tensor) -> LowRank:
        r"""Condition on some elements being zero; they keep their place, to be left out.

        With :math:`V^{-1} = I + W_S^\top D_S^{-1} W_S`, the latent normals are
        :math:`N(-V W_S^\top D_S^{-1} \mu_S, V)` given :math:`\theta_S = 0`.

        Parameters
        ----------
        drop : Tensor
            Positions of the elements of :math:`S`, or a mask that is True for them.

        Returns
        -------
        LowRank
            Of ``n`` elements, of which those in :math:`S` mean nothing.
        """
        gone = self.select(drop)
        weighted = gone.cov_factor / gone.cov_diag[:, None]
        identity = torch.eye(weighted.shape[-1], dtype=weighted.dtype, device=weighted.device)
        tril = torch.linalg.cholesky(identity + gone.cov_factor.mT @ weighted)
        shift = torch.cholesky_solve((weighted.mT @ gone.loc)[:, None], tril)[:, 0]
        factor = torch.linalg.solve_triangular(tril, self.cov_factor.mT, upper=False).mT
        return LowRank(self.loc - self.cov_factor @ shift, factor, self.cov_diag)

    def split(self, drop: Tensor) -> tuple[LowRank, LowRank]:
        """Factor the joint into the marginal of a set and the conditional of the rest at zero.

        Parameters
        ----------
        drop : Tensor
            Boolean, of shape ``(n,)``; True for the elements of the set.

        Returns
        -------
        tuple of LowRank
            The marginal of the set and the conditional of the rest, each in the order of the
            joint.
        """
        return self.select(drop), self.at_zero(drop).select(~drop)


@dataclass(frozen=True)
class Natural:
    r"""Gaussians :math:`\exp(h^\top\theta - \tfrac12 \theta^\top\Lambda\theta)`, not normalised.

    A product of densities adds their natural parameters, a quotient subtracts them. ``precision``
    has the shape of ``linear`` (:math:`h`) for independent elements, or is a matrix.
    """

    linear: Tensor
    precision: Tensor

    def __add__(self, other: Natural) -> Natural:
        return Natural(self.linear + other.linear, self.precision + other.precision)

    def __sub__(self, other: Natural) -> Natural:
        return Natural(self.linear - other.linear, self.precision - other.precision)

    def log_partition(self) -> Tensor:
        r"""Return the log of the normaliser in nats; NaN where the precision is not positive.

        .. math:: A = \tfrac12 h^\top \Lambda^{-1} h - \tfrac12 \ln|\Lambda| + \tfrac n2 \ln 2\pi
        """  # noqa: DOC201
        if self.precision.dim() == self.linear.dim():
            precision = torch.where(self.precision > 0, self.precision, torch.nan)
            return 0.5 * (self.linear.square() / precision - precision.log() + LOG_2PI)
        tril, failed = torch.linalg.cholesky_ex(self.precision)
        whitened = torch.linalg.solve_triangular(tril, self.linear[:, None], upper=False)
        log_partition = (
            0.5 * (whitened.square().sum() + len(tril) * LOG_2PI) - tril.diagonal().log().sum()
        )
        return torch.where(failed == 0, log_partition, torch.nan)
