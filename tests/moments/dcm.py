"""Dynamic causal models in SPM's format, read by hand, and log evidences of their reductions.

In natural parameters on the subspace where the posterior varies, in numpy alone.
"""

import os
from pathlib import Path

import numpy as np
import scipy.io
from scipy import sparse

DATA = Path(os.environ.get("PYRO_BMR_DATA", Path(__file__).parents[3] / "shared" / "data"))
FILES = ("fmri_a", "fmri_b", "erp_a", "eeg_correlated_prior")
_DETERMINED = 1e-9


def flatten(value):
    """All numbers in SPM's order: fields as they stand, cells and arrays by column."""
    if sparse.issparse(value):
        value = value.toarray()
    if hasattr(value, "_fieldnames"):
        return np.concatenate([flatten(getattr(value, name)) for name in value._fieldnames])
    if value.dtype == object:
        return np.concatenate([np.zeros(0), *map(flatten, value.ravel(order="F"))])
    return np.asarray(value, dtype=float).ravel(order="F")


class Dcm:
    """Mean and covariance before and after, of the free parameters."""

    def __init__(self, name):
        path = DATA / "dcm" / f"{name}.mat"
        dcm = scipy.io.loadmat(path, struct_as_record=False)["DCM"][0, 0]
        model = dcm.M[0, 0]
        prior = model.pC.toarray() if sparse.issparse(model.pC) else model.pC
        prior = np.diag(flatten(prior)) if prior.dtype == object else np.asarray(prior, float)
        spread = dcm.Cp.toarray() if sparse.issparse(dcm.Cp) else np.asarray(dcm.Cp, float)
        self.mean, self.prior_mean = flatten(dcm.Ep), flatten(model.pE)
        self.covariance, self.prior_covariance = ((c + c.T) / 2 for c in (spread, prior))
        self.free_energy = float(dcm.F.item())
        self.free = (np.diag(spread) > 0) & (np.diag(prior) > 0)

    def problem(self):
        """Posterior and prior in coordinates z of the subspace: θ = μ + V z."""
        free = np.flatnonzero(self.free)
        spread = self.covariance[np.ix_(free, free)]
        scale = np.sqrt(np.diag(spread))
        size, basis = np.linalg.eigh(spread / np.outer(scale, scale))
        basis, _ = np.linalg.qr(scale[:, None] * basis[:, size > _DETERMINED])
        prior = basis.T @ self.prior_covariance[np.ix_(free, free)] @ basis
        return Problem(
            self.mean[free],
            basis,
            basis.T @ spread @ basis,
            basis.T @ (self.prior_mean - self.mean)[free],
            prior,
        )


class Problem:
    def __init__(self, mean, basis, covariance, prior_mean, prior_covariance):
        self.mean, self.basis = mean, basis
        self.prior_mean, self.prior_covariance = prior_mean, prior_covariance
        self.precision, self.prior_precision = map(np.linalg.inv, (covariance, prior_covariance))
        spread = np.einsum("ij,jk,ik->i", basis, prior_covariance, basis)
        self.scale = np.sqrt(spread)
        self.linear, self.prior_linear = 0 * prior_mean, self.prior_precision @ prior_mean

    def conditional(self, drop):
        """ΔF where the rest keeps the prior given that what is dropped is zero."""
        if not drop.any():
            return 0.0
        root = np.linalg.cholesky(self.prior_covariance)
        rows, mean = (self.basis @ root)[drop] / self.scale[drop, None], self.mean[drop]
        point = -np.linalg.lstsq(rows, mean / self.scale[drop], rcond=1e-6)[0]
        off = mean / self.scale[drop] + rows @ point
        if np.abs(off).max() > 1e-6:  # some combination is known, and not zero
            return np.inf
        point, null = root @ point, root @ _null_space(rows)
        before = _log_partition(self.precision, self.linear) - _log_partition(
            self.prior_precision, self.prior_linear
        )
        after = _log_partition_along(self.precision, self.linear, point, null)
        after -= _log_partition_along(self.prior_precision, self.prior_linear, point, null)
        return before - after

    def marginal(self, drop):
        """ΔF where the rest keeps its marginal prior, as in SPM: ``R * pC * R``."""
        kept = ~drop
        mean = self.basis.T @ (kept * (self.mean + self.basis @ self.prior_mean) - self.mean)
        whole = self.basis @ self.prior_covariance @ self.basis.T * np.outer(kept, kept)
        size, vectors = np.linalg.eigh(self.basis.T @ whole @ self.basis)
        root = vectors[:, size > 1e-14] * np.sqrt(size[size > 1e-14])
        before = _log_partition(self.precision, self.linear) - _log_partition(
            self.prior_precision, self.prior_linear
        )
        precision, linear = self.precision - self.prior_precision, self.linear - self.prior_linear
        inner = np.eye(root.shape[1]) + root.T @ precision @ root
        if len(inner) and np.linalg.eigvalsh(inner)[0] <= 0:
            return np.inf
        slope = root.T @ (linear - precision @ mean)
        after = linear @ mean - 0.5 * mean @ precision @ mean
        after += 0.5 * slope @ np.linalg.solve(inner, slope) - 0.5 * np.linalg.slogdet(inner)[1]
        return before - after


def _null_space(rows):
    _, size, right = np.linalg.svd(rows, full_matrices=True)
    return right[int((size > 1e-6).sum()) :].T


def _log_partition(precision, linear):
    return 0.5 * (linear @ np.linalg.solve(precision, linear) - np.linalg.slogdet(precision)[1])


def _log_partition_along(precision, linear, point, null):
    """Of z = point + null w, over w."""
    inner, slope = null.T @ precision @ null, null.T @ (linear - precision @ point)
    return linear @ point - 0.5 * point @ precision @ point + _log_partition(inner, slope)
