"""The design of a group: a number per subject and covariate, with names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmr.arguments.checks import read_names, refuse
from pyro_bmr.arguments.columns import read_columns
from pyro_bmr.display import warn
from pyro_bmr.moments.names import read_numbers

if TYPE_CHECKING:
    import pandas as pd

# Of columns of length one, what counts as nothing.
_NOTHING = 1e-8
CONSTANT = "mean"


@dataclass(frozen=True)
class Design:
    """``values`` ``(N, p)``, of subjects and covariates.

    ``constant`` ``(p,)`` is the mixture of covariates that is 1 for every subject; zero where there
    is none.
    """

    values: Tensor
    covariates: tuple[str, ...]
    constant: Tensor

    def frame(self, subjects: Sequence[str]) -> pd.DataFrame:
        """As a table."""
        import pandas as pd

        index = pd.Index(subjects, name="subject")
        return pd.DataFrame(self.values.cpu().numpy(), index=index, columns=list(self.covariates))


def read_design(
    design: Any, subjects: Sequence[str], by_name: bool, names: Any, device: torch.device
) -> Design:
    """Read a design, and refuse one whose columns depend on each other.

    ``by_name``: the subjects have names, which the index of a table is matched with.
    """
    import pandas as pd

    count = len(subjects)
    if design is None:
        design = np.ones((count, 1))
    if isinstance(design, pd.Series):
        design = design.to_frame()
    if isinstance(design, pd.DataFrame) and by_name:
        design = _match(design, subjects)
    values = read_numbers("design", design).to(device)
    if values.dim() == 1:
        values = values[:, None]
    if values.dim() != 2 or len(values) != count or not values.shape[1]:
        refuse("design", design, f"a row for each of the {count} subjects, a column per covariate")
    spread = values.amax(0) - values.amin(0)
    is_constant = (spread == 0) & (values[0] != 0)
    covariates = _read_covariates(design, names, is_constant)
    _check_rank(values, covariates)
    return Design(values, covariates, _find_constant(values, covariates))


def _find_constant(values: Tensor, covariates: Sequence[str]) -> Tensor:
    """Mix the covariates into one that is 1 for every subject, where they can be."""
    length = values.norm(dim=0)
    ones = values.new_ones(len(values), 1)
    share = torch.linalg.lstsq(values / length, ones).solution[:, 0]
    share = torch.where(share.abs() < _NOTHING * len(values) ** 0.5, 0.0, share)
    if float((values / length @ share - 1).abs().max()) > _NOTHING:
        warn(
            f"no mixture of the covariates {list(covariates)} is the same for every subject, so "
            "that the group mean has no covariate, and is held at zero. Add a column of ones "
            "unless that is meant"
        )
        return torch.zeros_like(share)
    return share / length


def _match(design: pd.DataFrame, subjects: Sequence[str]) -> pd.DataFrame:
    index = [str(one) for one in design.index]
    if len(set(index)) < len(index) or set(index) != set(subjects):
        only = sorted(set(subjects) - set(index)) or sorted(set(index) - set(subjects)) or index
        msg = (
            f"got a design whose index is not that of the posteriors: {only[:5]} are in one only, "
            "or more than once. Expected a row for each subject, by its name; design.to_numpy() is "
            "taken in the order of the posteriors"
        )
        raise ValueError(msg)
    return design.set_axis(index, axis=0).loc[list(subjects)]


def _read_covariates(design: Any, names: Any, is_constant: Tensor) -> tuple[str, ...]:
    count = len(is_constant)
    given = read_names("names", names, "names of covariates")
    found = given if given is not None else read_columns((design,))
    if not found:
        found = tuple(f"covariate {i}" for i in range(1, count + 1))
        if int(is_constant.sum()) == 1:
            at = int(is_constant.nonzero()[0, 0])
            found = (*found[:at], CONSTANT, *found[at + 1 :])
    if len(found) != count or len(set(found)) < count:
        refuse("names", found, f"{count} names that differ, one for each covariate of the design")
    return found


def _check_rank(values: Tensor, covariates: Sequence[str]) -> None:
    """Raise a ValueError that names the covariates that depend on each other."""
    length = values.norm(dim=0)
    empty = [name for name, one in zip(covariates, length, strict=True) if one == 0]
    if empty:
        msg = (
            f"got a design whose covariates {empty} are zero for every subject. Expected ones that "
            "tell subjects apart, or a constant: leave these out"
        )
        raise ValueError(msg)
    if len(values) < values.shape[1]:
        msg = (
            f"got a design with {values.shape[1]} covariates of {len(values)} subjects. Expected "
            "no more covariates than subjects"
        )
        raise ValueError(msg)
    _, singular, vectors = torch.linalg.svd(values / length, full_matrices=False)
    if float(singular[-1]) > _NOTHING * float(singular[0]):
        return
    share = vectors[-1].abs()
    depend = [name for name, one in zip(covariates, share, strict=True) if one > 1e-6]
    msg = (
        f"got a design in which the covariates {depend} depend on each other: one is a mixture of "
        "the others. Expected independent columns: leave one of them out"
    )
    raise ValueError(msg)
