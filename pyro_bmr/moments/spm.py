"""`read_spm`: posteriors that SPM estimated, of dynamic causal models and of groups of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import numpy as np

from pyro_bmr.arguments.checks import check_path, read_count, refuse
from pyro_bmr.moments.matlab import Unordered, read_mat
from pyro_bmr.moments.posterior import Posterior

# What SPM's functions call them, in the order in which they are looked for.
_VARIABLES = ("DCM", "PEB", "GCM", "RCM", "BMA")


def read_spm(path: str | PathLike[str], *, index: int | None = None) -> Posterior:
    """Read a posterior with its prior from a ``.mat`` file of SPM.

    Of a dynamic causal model, DCM, these are ``Ep``, ``Cp``, ``M.pE`` and ``M.pC``, stacked as
    ``spm_vec`` does; of a group level, PEB, ``Ep`` of all covariates one after the other. Elements
    without variance are fixed, and are left as they are.

    Parameters
    ----------
    path : path
        Of a MATLAB file. Version 7.3 needs h5py.
    index : int, optional
        Which of several, from 0 and column by column, of a cell array such as ``GCM``. In a file
        with a ``PEB`` and ``RCM``, it is the former without ``index``, one of the latter with it.

    Returns
    -------
    Posterior
        Its names are those of ``spm_fieldindices``: ``A(2,1)`` of a matrix, ``T(3)`` of a vector,
        ``A{1}(2,3)`` of a cell; but ``CV``, without ``(1)``, of a scalar, and ``H.decay(1)`` of a
        struct in a struct. Of a PEB, ``A(2,1) × group`` with the name of the covariate. Its free
        energy is that of a loss, ``-F``.

    Raises
    ------
    ValueError
        If the file is none of MATLAB, holds no such posterior or several, or its sizes do not fit.
    FileNotFoundError
        If there is no file.
    ImportError
        If the file is of version 7.3 and h5py is not installed.

    References
    ----------
    .. [1] Friston, K. J., Litvak, V., Oswal, A., Razi, A., Stephan, K. E., van Wijk, B. C. M.,
       Ziegler, G. and Zeidman, P., "Bayesian model reduction and empirical Bayes for group (DCM)
       studies", NeuroImage 128, 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from scipy.io import savemat
    >>> prior = {"pE": {"A": np.zeros((2, 2)), "d": 0.0}, "pC": np.eye(5)}
    >>> full = {"Ep": {"A": np.ones((2, 2)), "d": 0.5}, "Cp": np.eye(5) / 9, "M": prior, "F": -7.0}
    >>> path = Path(mkdtemp()) / "DCM.mat"
    >>> savemat(path, {"DCM": full})
    >>> read_spm(path).names
    ('A(1,1)', 'A(2,1)', 'A(1,2)', 'A(2,2)', 'd')
    """
    check_path(path)
    contents = read_mat(path)
    found = _choose(contents, index)
    missing = sorted({"Ep", "Cp"} - found.keys())
    model = found.get("M")
    model = model if isinstance(model, Mapping) else {}
    # spm_dcm_peb keeps the prior of the second level in pE and pC; bE and bC are what it was given.
    mean, covariance = model.get("pE", model.get("bE")), model.get("pC", model.get("bC"))
    missing += [f"M.{name}" for name, one in {"pE": mean, "pC": covariance}.items() if one is None]
    if missing:
        msg = (
            f"got {str(path)!r} without {', '.join(missing)}. Expected an estimated model, with "
            "Ep, Cp, M.pE and M.pC"
        )
        raise ValueError(msg)
    stacked = _group_level(found) if "Pnames" in found else dict(_stack(found["Ep"], "", "Ep"))
    size, level = len(stacked), found.get("F")
    return Posterior(
        np.array(list(stacked.values())),
        _square("Cp", found["Cp"], size),
        prior_mean=_vector("M.pE", mean, size),
        prior_covariance=_square("M.pC", covariance, size),
        names=list(stacked),
        free_energy=None if level is None or not np.size(level) else -float(np.ravel(level)[0]),
    )


def _choose(contents: Mapping[str, Any], index: int | None) -> Mapping[str, Any]:
    """Find the one struct that is meant."""
    known = [name for name in _VARIABLES if name in contents]
    if not known and len(contents) != 1:
        msg = f"got a file with {sorted(contents)}. Expected one of {', '.join(_VARIABLES)}"
        raise ValueError(msg)
    several = [name for name in known if not isinstance(contents[name], Mapping)]
    place = next(iter((several if index is not None else []) + known + list(contents)))
    value = contents[place]
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = list(value.reshape(-1, order="F"))
    if isinstance(value, list) and value:
        if index is None and len(value) > 1:
            msg = (
                f"got {place} with {len(value)} entries. Expected index= to say which, from 0 to "
                f"{len(value) - 1}"
            )
            raise ValueError(msg)
        at = read_count("index", index or 0, 0, len(value) - 1)
        value, place = value[at], f"{place}, at {at},"
    elif index is not None:
        refuse("index", index, f"None: {place} is one model")
    if isinstance(value, str):
        msg = f"got {place} with the name of a file, {value!r}. Expected that file's path"
        raise ValueError(msg)  # noqa: TRY004
    if not isinstance(value, Mapping):
        msg = f"got {place} that is no struct. Expected an estimated model, a DCM or a PEB"
        raise ValueError(msg)  # noqa: TRY004
    return value


def _group_level(group: Mapping[str, Any]) -> dict[str, float]:
    """Name the elements of a second level: parameters, by covariate."""
    means = np.atleast_2d(np.asarray(group["Ep"], dtype=float))
    parameters, covariates = (_words(group.get(name)) for name in ("Pnames", "Xnames"))
    if means.size == len(parameters) * max(len(covariates), 1):
        means = means.reshape(len(parameters), -1, order="F")
    covariates = covariates or [f"Covariate {i + 1}" for i in range(means.shape[1])]
    if means.shape != (len(parameters), len(covariates)):
        msg = (
            f"got Ep of shape {means.shape} for {len(parameters)} Pnames and {len(covariates)} "
            "Xnames. Expected parameters along its rows and covariates along its columns"
        )
        raise ValueError(msg)
    names = [f"{one} × {covariate}" for covariate in covariates for one in parameters]
    return dict(zip(names, means.reshape(-1, order="F").tolist(), strict=True))


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    entries: Any = [] if value is None else np.asarray(value, dtype=object).reshape(-1, order="F")
    return [str(entry).strip() for entry in entries]


def _stack(value: Any, name: str, place: str) -> Iterator[tuple[str, float]]:
    """Stack all numbers as ``spm_vec`` does, field by field and down the columns, with names."""
    if isinstance(value, Unordered):
        msg = (
            f"{place} does not tell the order of its fields {sorted(value)}, by which Cp is read. "
            "Expected a file that MATLAB wrote; save(..., '-v7') keeps their order"
        )
        raise ValueError(msg)  # noqa: TRY004
    if isinstance(value, Mapping):
        for field, one in value.items():
            yield from _stack(one, f"{name}.{field}" if name else field, place)
    elif isinstance(value, list):
        for field, i in itertools.product(value[0] if value else (), range(len(value))):
            yield from _stack(value[i][field], f"{name}({i + 1}).{field}", place)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        for i, one in enumerate(value.reshape(-1, order="F")):
            yield from _stack(one, f"{name}{{{i + 1}}}", place)
    elif not isinstance(value, str):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            msg = f"got {place} with {name} that is {array.dtype}. Expected real numbers"
            raise ValueError(msg)
        numbers = array.reshape(-1, order="F").tolist()
        yield from zip(_indexed(name, array.shape), map(float, numbers), strict=True)


def _indexed(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Name the elements of an array from 1, the first index the fastest."""
    if all(size == 1 for size in shape):
        return iter([name])
    if len(shape) == 2 and min(shape) == 1:
        shape = (max(shape),)
    backwards = itertools.product(*(range(1, size + 1) for size in reversed(shape)))
    return (f"{name}({','.join(map(str, reversed(index)))})" for index in backwards)


def _vector(place: str, value: Any, size: int) -> np.ndarray:
    vector = np.array([number for _, number in _stack(value, "", place)])
    if len(vector) != size:
        msg = f"got {place} of {len(vector)} elements. Expected {size}, as many as of Ep"
        raise ValueError(msg)
    return vector


def _square(place: str, value: Any, size: int) -> np.ndarray:
    """Read a covariance, given as one, as a vector of variances or as a struct of them."""
    if isinstance(value, np.ndarray) and value.dtype != object and value.shape == (size, size):
        return value.astype(float)
    return np.diag(_vector(place, value, size))
