"""`group_level`: what covariates do to the parameters of subjects, from their posteriors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from pyro_bmr.arguments.checks import check_kind, refuse
from pyro_bmr.display import Tabular, warn
from pyro_bmr.mathematics.newton import Maximum
from pyro_bmr.mathematics.two_levels import (
    GivenGamma,
    SecondLevel,
    condition,
    fit_hyperparameters,
    log_evidence,
)
from pyro_bmr.moments.names import read_numbers
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.second_level.designs import Design, read_design
from pyro_bmr.second_level.first_levels import FirstLevels, read_first_levels, read_subjects
from pyro_bmr.second_level.group_prior import (
    GroupPrior,
    make_second_level,
    read_components,
    read_group_mean,
)
from pyro_bmr.second_level.left_out import LeftOut, predict_left_out

if TYPE_CHECKING:
    import pandas as pd


@torch.inference_mode(False)
@torch.no_grad()
def group_level(
    posteriors: Any,
    design: Any = None,
    *,
    parameters: Any = None,
    components: Any = "single",
    names: Any = None,
    prior: GroupPrior | None = None,
    log_precisions: Any = None,
) -> GroupLevel:
    r"""Explain the parameters of subjects by covariates: parametric empirical Bayes.

    .. math:: \theta_i = (x_i^\top \otimes I) \beta + \varepsilon_i, \quad
              \varepsilon_i \sim N(0, R^{-1}), \quad
              R = Q_0 + \sum_k e^{\gamma_k} Q_k

    for the chosen parameters :math:`\theta_i` of subject :math:`i` and its row :math:`x_i` of the
    design. The posterior of a subject over its prior is its likelihood, up to a constant: no data
    and no models are needed. Given the log precisions :math:`\gamma`, the effects :math:`\beta` and
    the evidence are exact for Gaussian posteriors; :math:`\gamma` is where the evidence times its
    prior is largest, and F has Laplace's approximation over it.

    Parameters
    ----------
    posteriors : sequence of Posterior, or mapping
        One per subject, with priors; by subject in a mapping or a pandas Series. Parameters are
        matched by name. Where one is fixed in a subject, with zero variance, that subject has no
        such parameter, and says nothing about it: it is as if its data were missing.
    design : array or DataFrame, optional
        A row per subject, a column per covariate, with names if it is a DataFrame; the index is
        matched with the subjects of a mapping. No column is added: include one of ones. Without
        a design, that is the only one.
    parameters : str or sequence of str, optional
        Names, fields (``"A"`` is every ``A(2,1)`` or ``A[2,1]``), or patterns with ``*`` and ``?``.
        All that vary otherwise. The rest keeps its prior, given these.
    components : str or mapping
        What has a variance between subjects of its own: ``"single"``, all parameters one in common;
        ``"fields"``, each field; ``"all"``, each parameter; or, by name, parameters as above.
        Within a component, variances are proportional to ``prior.between``.
    names : sequence of str, optional
        Of the covariates.
    prior : GroupPrior, optional
        Of effects and of log precisions; those of SPM otherwise.
    log_precisions : float or sequence, optional
        :math:`\gamma`, held there, one per component; they are found from the data otherwise.

    Returns
    -------
    GroupLevel
        Its ``posterior`` can be reduced, averaged and compared as any other.

    Raises
    ------
    ValueError
        If parameters are missing in a subject or fixed in all, covariates depend on each other, the
        design and the posteriors do not match, or a subject's posterior is so much wider than its
        prior that there is no proper one under the group's.
    TypeError
        If something is no `Posterior`.

    Notes
    -----
    SPM's ``spm_dcm_peb`` maximises over :math:`(\beta, \gamma)` together, and finds smaller
    variances between subjects than the evidence does; it takes priors from the first subject, and
    here they are averaged; and it narrows the posteriors of subjects by 1/16 of their prior
    precision, which is not done here.

    References
    ----------
    Friston et al. (2016), "Bayesian model reduction and empirical Bayes for group (DCM) studies",
    NeuroImage 128; Zeidman et al. (2019), "A guide to group effective connectivity analysis, part
    2: second level analysis with PEB", NeuroImage 200.

    Examples
    --------
    >>> import pandas as pd
    >>> means = [[0.9, 0.1], [1.1, -0.2], [0.3, 0.0], [0.1, 0.1]]
    >>> posteriors = [
    ...     Posterior(mean, scale=[0.2, 0.2], prior_scale=1.0, names=["A(1,1)", "A(2,1)"])
    ...     for mean in means
    ... ]
    >>> design = pd.DataFrame({"mean": 1.0, "group": [1.0, 1.0, -1.0, -1.0]})
    >>> result = group_level(posteriors, design)
    >>> result.posterior.names
    ('A(1,1) × mean', 'A(2,1) × mean', 'A(1,1) × group', 'A(2,1) × group')
    >>> result.summary().loc[("group", "A(1,1)"), "mean"].round(2)
    np.float64(0.41)
    """
    import pandas as pd

    subjects = read_subjects(posteriors)
    by_name = isinstance(posteriors, Mapping | pd.Series)
    device = next(iter(subjects.values())).mean.device
    if prior is None:
        prior = GroupPrior()
    check_kind("prior", prior, GroupPrior, "a pyro_bmr.GroupPrior")
    read = read_design(design, tuple(subjects), by_name, names, device)
    first = read_first_levels(subjects, parameters)
    varied = read_components(components, first.parameters, device)
    level = make_second_level(prior, first, read, varied)
    held = _read_log_precisions(log_precisions, level)
    start = level.log_mean if held is None else held
    _check_proper(first, level, start)
    if condition(first.units, read.values, level, start) is None:
        _refuse_wide(first)
    _warn_of_first_levels(first)
    maximum, gamma = None, held
    if gamma is None:
        maximum = fit_hyperparameters(first.units, read.values, level)
        gamma = maximum.at
        if not maximum.converged:
            warn(
                "the log precisions between subjects have not converged. Give fewer components, "
                "a narrower prior of them, or hold them by log_precisions="
            )
    found = condition(first.units, read.values, level, gamma)
    if found is None:
        msg = "a subject has no proper posterior under the group's prior. Expected narrower ones"
        raise ValueError(msg)
    study = Study(first, read, level, held)
    return _report(study, prior, tuple(varied), maximum, found)


@dataclass(frozen=True)
class Study:
    """What a second level is fitted to; ``held`` are log precisions that are given."""

    first: FirstLevels
    design: Design
    level: SecondLevel
    held: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class GroupLevel(Tabular):
    r"""What covariates do to the parameters of subjects.

    Parameters
    ----------
    posterior : Posterior
        Of the effects :math:`\beta`, given the log precisions, with their prior and F; names such
        as ``A(2,1) × group``, those of a covariate together.
    log_precisions : Posterior
        Of :math:`\gamma`, by component; of no variance where they were given.
    between_covariance : Tensor
        :math:`R^{-1}`, of subjects around what their covariates say; ``(k, k)`` over parameters.
    delta_f : float
        F of the two levels together minus F of all subjects, each by itself, in nats.
    free_energy : float or None
        F of the two levels: ``delta_f`` and the F of the subjects; None where one of these is not
        known. Of two designs or components of the same subjects, the better has the lower F.
    design : DataFrame
        Of subjects and covariates.
    parameters : tuple of str
        The chosen ones.
    """

    posterior: Posterior
    log_precisions: Posterior
    between_covariance: Tensor
    delta_f: float
    free_energy: float | None
    design: pd.DataFrame
    parameters: tuple[str, ...]
    _study: Study = field(repr=False)
    _found: GivenGamma = field(repr=False)

    @property
    def first_levels(self) -> dict[str, Posterior]:
        r"""By subject, its posterior under :math:`N((x_i^\top \otimes I) \hat\beta, R^{-1})`."""
        return {subject: posterior for subject, (posterior, _) in self._refitted.items()}

    @property
    def first_level_delta_f(self) -> pd.Series:
        """By subject, F under the prior of the group minus F under its own, in nats."""
        import pandas as pd

        changes = {subject: float(delta) for subject, (_, delta) in self._refitted.items()}
        return pd.Series(changes, name="delta_f").rename_axis("subject")

    @cached_property
    def _refitted(self) -> dict[str, tuple[Posterior, Tensor]]:
        first, design = self._study.first, self._study.design
        rows = design.values @ self._found.mean.reshape(len(design.covariates), -1)
        covariance = self._found.between_covariance
        pairs = enumerate(zip(first.subjects, rows, strict=True))
        return {subject: first.under_prior(i, row, covariance) for i, (subject, row) in pairs}

    def leave_one_out(self, covariate: str | None = None) -> LeftOut:
        r"""Predict a covariate of each subject from the other subjects.

        The group is fitted to the others, with the same priors. Under its posterior, the left-out
        subject has the likelihood

        .. math:: p(y_i | x) \propto \int \frac{q_i(\theta)}{p_i(\theta)}
                  N(\theta \mid (x^\top \otimes I) \hat\beta,
                  R^{-1} + (x^\top \otimes I) \Sigma_\beta (x \otimes I)) d\theta

        as a function of its covariate. The prior of that is a normal with the mean of the others
        and four times their variance, as in SPM; the integral over it is done on a grid. Where the
        covariate has levels that come back, their likelihoods are also compared, each being as
        probable before.

        Parameters
        ----------
        covariate : str, optional
            Of the design; the first that is not constant otherwise.

        Returns
        -------
        LeftOut
            Predictions beside what is true.

        Raises
        ------
        ValueError
            If there is no such covariate, it is constant, or the design of the others depends on
            itself.

        Notes
        -----
        SPM's ``spm_dcm_loo`` takes :math:`\hat\beta` as known, lets the other covariates of the
        subject vary, too, and moves the prior onto the posterior four times.

        References
        ----------
        Friston et al. (2016), NeuroImage 128, section on cross-validation.

        Examples
        --------
        >>> import pandas as pd
        >>> posteriors = [
        ...     Posterior([mean], scale=[0.2], prior_scale=1.0, names=["A(1,1)"])
        ...     for mean in (0.9, 1.1, 0.8, 0.1, -0.1, 0.3)
        ... ]
        >>> design = pd.DataFrame({"mean": 1.0, "group": [1, 1, 1, -1, -1, -1]})
        >>> left_out = group_level(posteriors, design).leave_one_out("group")
        >>> bool(left_out.correlation > 0.9)
        True
        """
        return predict_left_out(self._study, covariate)

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per covariate and parameter.

        Returns
        -------
        DataFrame
            Indexed by both; columns ``mean``, ``sd`` and ``P(> 0)``.
        """
        import pandas as pd
        from scipy.special import ndtr

        mean = self.posterior.mean.cpu().numpy()
        sd = self.posterior.covariance.diagonal().clamp_min(0).sqrt().cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            positive = np.where(mean == 0, 0.5, ndtr(mean / sd))
        index = pd.MultiIndex.from_product(
            [self.design.columns, self.parameters], names=["covariate", "parameter"]
        )
        return pd.DataFrame({"mean": mean, "sd": sd, "P(> 0)": positive}, index=index)

    def __rich__(self) -> Group:
        frame = self.summary()
        tables = []
        for covariate, title in zip(self.design.columns, self._titles, strict=True):
            table = Table("parameter", title=title, title_justify="left")
            for column in frame.columns:
                table.add_column(column, justify="right")
            for name, row in frame.loc[covariate].iterrows():
                cells = (f"{row['mean']:.4g}", f"{row['sd']:.4g}", f"{row['P(> 0)']:.3f}")
                table.add_row(str(name), *cells)
            tables.append(table)
        return Group(*tables)

    def _frames(self) -> dict[str, pd.DataFrame]:
        size = len(self.parameters)
        frame = self.summary().reset_index("covariate", drop=True)
        return {
            title: frame.iloc[at * size : (at + 1) * size] for at, title in enumerate(self._titles)
        }

    @property
    def _titles(self) -> tuple[str, ...]:
        told = [f"{len(self.design):,} subjects", f"ΔF = {self.delta_f:,.2f} nats"]
        if self.free_energy is not None:
            told.append(f"F = {self.free_energy:,.2f} nats")
        first, *others = (f"effects of {one}" for one in self.design.columns)
        return ("\n".join([*told, first]), *others)


def _report(
    study: Study,
    prior: GroupPrior,
    components: tuple[str, ...],
    maximum: Maximum | None,
    found: GivenGamma,
) -> GroupLevel:
    first, design, level = study.first, study.design, study.level
    evidence = found.log_evidence
    at, spread = study.held, torch.zeros_like(level.log_precision)
    if maximum is not None:
        evidence = log_evidence(level, found, maximum)
        at, spread = maximum.at, maximum.curvature.inverse()
    levels = [one.free_energy for one in first.posteriors.values()]
    known = [one for one in levels if one is not None]
    delta_f = -float(evidence)
    free_energy = sum(known) + delta_f if len(known) == len(levels) else None

    basis = first.basis
    covariates = torch.eye(len(design.covariates), device=basis.device, dtype=basis.dtype)
    whole = torch.kron(covariates, basis)
    mean = read_group_mean(prior, first)
    beyond = torch.kron(design.constant, mean - basis @ (basis.mT @ mean))
    effects = Posterior(
        whole @ found.mean + beyond,
        covariance=whole @ found.covariance @ whole.mT,
        prior_mean=whole @ level.mean + beyond,
        prior_covariance=whole @ torch.linalg.inv(level.precision) @ whole.mT,
        names=[f"{name} × {one}" for one in design.covariates for name in first.parameters],
        free_energy=free_energy,
    )
    log_precisions = Posterior(
        at,
        covariance=(spread + spread.mT) / 2,
        prior_mean=level.log_mean,
        prior_covariance=level.log_precision.inverse(),
        names=components,
    )
    return GroupLevel(
        effects,
        log_precisions,
        basis @ found.between_covariance @ basis.mT,
        delta_f,
        free_energy,
        design.frame(first.subjects),
        first.parameters,
        study,
        found,
    )


def _read_log_precisions(value: Any, level: SecondLevel) -> Tensor | None:
    if value is None:
        return None
    numbers = read_numbers("log_precisions", value).to(level.log_mean)
    count = len(level.log_mean)
    if numbers.shape not in {(), (1,), (count,)} or bool((numbers.abs() > 500).any()):
        refuse("log_precisions", value, f"a number for each of the {count} components")
    return numbers.expand(count).clone()


def _refuse_wide(first: FirstLevels) -> NoReturn:
    msg = (
        f"the posteriors of {list(first.wide)[:5]} are wider than their priors in some direction, "
        "so that the effects have no proper posterior. Expected posteriors that the data narrowed: "
        "estimate these subjects again, leave them out, or choose other parameters="
    )
    raise ValueError(msg)


def _warn_of_first_levels(first: FirstLevels) -> None:
    if first.wide:
        warn(
            f"the posteriors of {_count_names(first.wide)} are wider than their priors in some "
            "direction, which no data explain. Estimate these subjects again, or leave them out"
        )
    if first.unlike:
        warn(
            f"the prior variances of {_count_names(first.unlike)} differ between subjects by more "
            "than a factor of 10; their average is taken. Estimate subjects under one prior, or "
            "give prior=GroupPrior(...)"
        )


def _count_names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def _check_proper(first: FirstLevels, level: SecondLevel, gamma: Tensor) -> None:
    """Raise a ValueError that names the subjects without a posterior under the group's prior."""
    between = level.floor + (gamma.exp()[:, None, None] * level.components).sum(0)
    failed = torch.linalg.cholesky_ex(first.units.curvature + between).info != 0
    subjects = [name for name, one in zip(first.subjects, failed, strict=True) if one]
    if subjects:
        msg = (
            f"the posteriors of {subjects[:5]} are so much wider than their priors that there are "
            "none under a wider prior of the group. Expected posteriors that the data narrowed, "
            "or a narrower prior: a larger beta of GroupPrior, or larger log_precisions="
        )
        raise ValueError(msg)
