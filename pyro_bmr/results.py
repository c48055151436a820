"""What `reduce` and `prune` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group, RenderableType
from torch import Tensor

from pyro_bmr.arguments.checks import (
    check_function,
    check_switch,
    read_count,
    read_device,
    read_seed,
)
from pyro_bmr.arguments.columns import read_columns
from pyro_bmr.compaction import Compaction, compact
from pyro_bmr.diagnostics.arviz_data import convert
from pyro_bmr.diagnostics.audit import Audit, run_audit
from pyro_bmr.diagnostics.refits import Refit
from pyro_bmr.display import Tabular, escape_lines
from pyro_bmr.export.costs import Costs, measure_costs
from pyro_bmr.export.portable import Portable
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.moments.no_program import NoProgram
from pyro_bmr.priors.site_priors import OTHER_LEVEL
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.data import read_data
from pyro_bmr.programs.handlers import PrunedModel
from pyro_bmr.selection.decision import Decision
from pyro_bmr.selection.flags import count_undecided
from pyro_bmr.selection.pictures import draw_kept
from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary, fold_alike
from pyro_bmr.selection.tables import (
    SitesTable,
    draw_layers,
    draw_rounds,
    frame_layers,
    frame_realised,
    frame_rounds,
    frame_sites,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Reduction(Portable, Tabular):
    """A pruned model and guide, and what was found on the way.

    Parameters
    ----------
    model : PrunedModel
        The model under masks: same sites and shapes, pruned elements exactly 0, shrunk ones with
        their reduced prior.
    guide : PrunedGuide
        The posterior given that the pruned elements are 0, ready for `pyro.infer.Predictive` and
        for further training.
    masks : mapping
        By site, a boolean tensor, True where kept; where a site was shrunk, True for elements
        that keep their prior. Sites left whole are absent.
    scores : mapping
        By site, ΔF in nats of dropping each element by itself, or of its shrinkage.
    sites : tuple of SiteSummary
        One row per site, those left whole with their reason.
    naive_delta_f : float, optional
        What ``delta_f`` would be, in nats, had every correlated element gone whose own ΔF is at
        most 0, and no other; None if nothing is correlated, or groups were dropped.
    layers : tuple of LayerSummary
        One row per layer of groups; empty where elements stand for themselves.
    realised, realised_error : float, optional
        ΔF as measured on the data, in nats, with its standard error; None if nothing was measured.
    notes : tuple of str
        What to doubt in the whole, as that the guide has not been trained to its end.
    rounds : tuple of Round
        What `prune` went through, also after the round that was kept; empty after `reduce`.
    decision : Decision, optional
        The posterior before, without a copy of it; None after `load`.

    Examples
    --------
    >>> Reduction(None, None, {}, {}, (SiteSummary("w", (4,), 1, -2.5),)).sparsity
    0.75
    """

    model: PrunedModel
    guide: PrunedGuide
    masks: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    sites: tuple[SiteSummary, ...]
    naive_delta_f: float | None = None
    layers: tuple[LayerSummary, ...] = ()
    realised: float | None = None
    realised_error: float | None = None
    notes: tuple[str, ...] = ()
    rounds: tuple[Round, ...] = ()
    decision: Decision | None = field(default=None, repr=False)

    @property
    def delta_f(self) -> float:
        """Joint ΔF in nats of all that was dropped, predicted; negative means lower free energy."""
        return sum(site.delta_f for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Fraction of all elements of the guide that are pruned, here and before."""
        total = sum(site.total for site in self.sites)
        return 1.0 - sum(site.kept for site in self.sites) / total if total else 0.0

    @cached_property
    def undecided(self) -> dict[str, int]:
        r"""By reducible site, how many elements have :math:`|\Delta F| < 0.05` nats.

        As a rule because the data say nothing about them, so that the sign is noise; see
        ``pyro_bmr.selection.flags``.
        """
        return {
            site.name: count_undecided(self.scores[site.name], site.pruned_before)
            for site in self.sites
            if site.name in self.scores
        }

    @property
    def shrunk(self) -> int:
        """How many elements took a reduced prior other than the spike."""
        return sum(site.shrunk for site in self.sites)

    @property
    def kept_round(self) -> Round | None:
        """The round of `prune` whose state this is; None after `reduce`."""
        return next((one for one in self.rounds if one.kept), None)

    @property
    def free_energy(self) -> float | None:
        """F in nats, measured in the round of `prune` that was kept; None after `reduce`."""
        return None if self.kept_round is None else self.kept_round.free_energy

    def summary(self) -> pd.DataFrame:
        """Return a table with one row per site.

        Where it is printed, many sites that are left whole for the same reason are one row.

        Returns
        -------
        DataFrame
            Indexed by site; columns ``shape``, ``total``, ``kept``, ``pruned %``, ``shrunk`` if
            any element was, ``delta_f`` (nats), ``realised`` (nats) if it was measured,
            ``undecided``, ``wide``, ``unscored`` (how many elements to doubt, see ``undecided`` and
            ``sites``) and ``note``.
        """
        return frame_sites(self.sites, self.undecided)

    def layer_summary(self) -> pd.DataFrame:
        """Return a table with one row per layer of groups.

        Returns
        -------
        DataFrame
            Indexed by layer; columns ``kind``, ``groups``, ``kept``, ``pruned %`` and ``delta_f``
            (nats). Empty where elements stand for themselves.
        """
        return frame_layers(self.layers)

    def round_summary(self) -> pd.DataFrame:
        """Return a table with one row per round of `prune`.

        Returns
        -------
        DataFrame
            Indexed by round; the columns are those of `Round`. Empty after `reduce`.
        """
        return frame_rounds(self.rounds)

    def compact(
        self, *args: Any, kwargs: Mapping[str, Any] | None = None, inputs: bool = False
    ) -> Compaction:
        """Cut out the units that nothing needs; and nothing changes: the same program, smaller.

        A unit goes when its term is exactly zero wherever it is summed over: when all that produces
        it is pruned, bias included, or all that reads it, or when nothing depends on what reads it.
        Live elements that go with an unread unit are marginalised, and their divergence leaves the
        free energy. Outputs stay, and at least one unit of every layer. The result is checked: at
        the posterior's median and at draws it must compute what the masked model does.

        Parameters
        ----------
        *args
            Of the model, as an example; those of the guide's first call otherwise.
        kwargs : mapping, optional
            Keyword arguments of the model.
        inputs : bool
            Whether inputs that nothing reads go. The compacted model then takes ``x[..., kept]``;
            see ``Compaction.inputs``.

        Returns
        -------
        Compaction
            The smaller model and guide, which compute the same.

        Raises
        ------
        ValueError
            If a prior cannot be cut.
        RuntimeError
            If the model cannot be captured, or the compacted one does not compute the same.

        Examples
        --------
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_bmr import reduce
        >>> def model(x, y):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        ...     v = pyro.sample("v", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
        ...     pyro.sample("y", dist.Normal(torch.tanh(x @ w) @ v, 1.0).to_event(2), obs=y)
        >>> guide = AutoNormal(model)
        >>> _ = guide(torch.ones(4, 3), torch.ones(4, 1))
        >>> result = reduce(guide, select=lambda _: {"v": torch.tensor([[True], [False]])})
        >>> result.compact().guide.median()["w"].shape
        torch.Size([3, 1])
        """
        return compact(self.model, self.guide, args, kwargs, inputs=inputs)

    def to(self, device: torch.device | str) -> Reduction:
        """Move to a device.

        Parameters
        ----------
        device : torch.device or str
            Where to.

        Returns
        -------
        Reduction
            With masks and scores there. Model and guide are moved in place, as in torch.
        """
        device = read_device(device)
        return replace(
            self,
            model=self.model.to(device),
            guide=self.guide.to(device),
            masks={name: mask.to(device) for name, mask in self.masks.items()},
            scores={name: scores.to(device) for name, scores in self.scores.items()},
        )

    def report(
        self, *args: Any, kwargs: Mapping[str, Any] | None = None, num_samples: int = 20
    ) -> Costs:
        """Compact, and measure what that saves; see `pyro_bmr.measure_costs`.

        Parameters
        ----------
        *args
            Of the model, the batch to time; those of the guide's first call otherwise.
        kwargs : mapping, optional
            Keyword arguments of the model.
        num_samples : int
            Of an ensemble.

        Returns
        -------
        Costs
            Parameters, operations and times of the masked and of the compacted network.
        """
        args, kwargs = self._example("report", args, kwargs)
        pairs = {"masked": self, "compacted": self.compact(*args, kwargs=kwargs)}
        return measure_costs(pairs, *args, kwargs=kwargs, num_samples=num_samples)

    def audit(
        self,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        num_samples: int = 100,
        refit: Refit | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Audit:
        """Measure whether what was predicted comes true; see `pyro_bmr.diagnostics.audit`.

        After `prune`, that is the reduction of the round that was kept.

        Parameters
        ----------
        *args
            Of the model: all of the data.
        kwargs : mapping, optional
            Keyword arguments of the model.
        num_samples : int
            Draws of each measurement.
        refit : callable, optional
            Trains the model and the guide that it is given, which are copies, as in
            ``lambda model, guide: pyro_bmr.fit(model, guide, x, y, num_epochs=50)``.
        seed : int
            Of all random numbers.
        progress : bool
            Show a progress bar, if there is a terminal or a notebook.

        Returns
        -------
        Audit
            Predicted and realised ΔF, with a verdict in words on the prediction, in total and per
            site. The reduction was a success if F fell, which is its ``conclusion``: a realised ΔF
            of -127 nats of -159 predicted is "optimistic by 32 nats", and a success.

        Raises
        ------
        ValueError
            If the result came from a file, if the guide that was reduced has been trained since, or
            if a free energy is not finite.
        TypeError
            If the model cannot be called with these arguments.
        """
        options: dict[str, Any] = {"num_samples": read_count("num_samples", num_samples, 2)}
        options |= {"seed": read_seed(seed), "refit": refit, "progress": progress}
        check_switch("progress", progress)
        if refit is not None:
            check_function("refit", refit, "a function of a model and a guide, which it trains")
        pair = self.model, self.guide
        return run_audit(self.decision, pair, *read_data(*pair, args, kwargs), **options)

    @alone("to_arviz")
    def to_arviz(
        self,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        num_samples: int = 1000,
        seed: int = 0,
        prior: bool = True,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str | None]] | None = None,
    ) -> Any:
        r"""Draw from the reduced guide, for ArviZ; see `pyro_bmr.to_arviz`.

        Shapes and dimensions are those of the full model. A group ``bmr`` is added, with these
        variables for each site that could be reduced, whose dimensions are those of the site:

        - ``{site}_delta_f``: ΔF in nats of dropping each element by itself, or of its shrinkage;
        - ``{site}_inclusion_probability``: :math:`1 / (1 + e^{-\Delta F})`, that the element is
          there, if before the data that was as probable as not and all others are; 0 where it was
          pruned before, 1 where it cannot go. `pyro_bmr.presence` does better where elements are
          correlated;
        - ``{site}_mask``: True for what is not pruned;
        - ``{site}_keeps_prior``: for a site that was shrunk, True for elements whose prior is the
          old one.

        Its attributes are ``delta_f``, ``sparsity`` and, where F was measured, ``realised`` and
        ``realised_error``.

        Parameters
        ----------
        *args
            Of the model: all of the data; those that it was made with otherwise.
        kwargs : mapping, optional
            Keyword arguments of the model.
        num_samples, seed, prior, coords, dims
            As of `pyro_bmr.to_arviz`.

        Returns
        -------
        InferenceData or DataTree
            ``arviz.InferenceData`` with ArviZ before 1.0, ``xarray.DataTree`` since.

        Raises
        ------
        TypeError
            If the model cannot be called with these arguments, or needs some and there are none.

        Notes
        -----
        The ridge plot of ArviZ 0.23 fails for point masses: leave out pruned elements by
        ``coords=``.
        """
        named = read_columns(args)
        args, kwargs = self._example("to_arviz", args, kwargs)
        columns = named or self.guide.origin.columns
        args, kwargs = read_data(self.model, self.guide, args, kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "prior": prior}
        known = {name: self._elements(name) for name in self.scores}
        totals = {"delta_f": self.delta_f, "sparsity": self.sparsity}
        measured = {"realised": self.realised, "realised_error": self.realised_error}
        totals |= {name: value for name, value in measured.items() if value is not None}
        options |= {"coords": coords, "dims": dims, "elements": known, "attributes": totals}
        options["columns"] = columns
        return convert(self.model, self.guide, args, kwargs, **options)

    def _plan(self) -> dict[str, Any]:
        return {
            "kind": "reduction",
            "masks": self.masks,
            "scores": self.scores,
            "rows": [asdict(site) for site in self.sites],
            "naive_delta_f": self.naive_delta_f,
            "realised": self.realised,
            "realised_error": self.realised_error,
            "notes": list(self._told),
            "layers": [asdict(layer) for layer in self.layers],
            "rounds": [asdict(one) for one in self.rounds],
        }

    def __rich__(self) -> RenderableType:
        caption = "\n".join(self._notes)
        return Group(
            *([draw_rounds(self.rounds)] if self.rounds else []),
            SitesTable(self.sites, self.undecided, self._title, caption),
            *([draw_layers(self.layers)] if self.layers else []),
        )

    def _frames(self) -> dict[str, pd.DataFrame]:
        said = ["undecided", "wide", "unscored"]  # in notes, too
        sites = frame_sites(fold_alike(self.sites), self.undecided).drop(columns=said)
        frames = {"sites": sites}
        frames |= {"layers": self.layer_summary()} if self.layers else {}
        frames |= (
            {"what came true": frame_realised(self.sites)} if self.realised is not None else {}
        )
        frames |= {"rounds": self.round_summary().round(3)} if self.rounds else {}
        digits = {"pruned %": 1, "delta_f": 2, "realised": 2, "difference": 2}
        columns = {"delta_f": "ΔF (nats)"}
        return {title: x.round(digits).rename(columns=columns) for title, x in frames.items()}

    @property
    def _head(self) -> str:
        return f"<p>{escape_lines(self._title)}</p>{draw_kept(self.sites)}"

    @property
    def _title(self) -> str:
        total = sum(site.total for site in self.sites)
        shrunk = f", {self.shrunk:,} of {total:,} shrunk" if self.shrunk else ""
        if self.realised is None:
            return f"{self.sparsity:.1%} pruned{shrunk}, ΔF = {self.delta_f:+.2f} nats"
        return (
            f"{self.sparsity:.1%} pruned{shrunk}, ΔF predicted {self.delta_f:+.2f}, "
            f"realised {self.realised:+.2f} ± {self.realised_error:.2f} nats"
        )

    @property
    def _told(self) -> tuple[str, ...]:
        """The notes, and that nothing was measured; a file has that among its notes."""
        told = any(note.startswith("not measured: ") for note in self.notes)
        told = told or isinstance(self.model, NoProgram)
        if self.realised is None and not (self.rounds or self.decision is None or told):
            return (*self.notes, "predicted, not measured: reduce(guide, *data) measures")
        return self.notes

    @property
    def _notes(self) -> tuple[str, ...]:
        notes = [*self._levels, *self._told]
        naive = self.naive_delta_f
        if naive is not None and abs(naive - self.delta_f) >= 0.005:
            notes.append(
                "dropping every element whose own ΔF is at most 0 would have given "
                f"ΔF = {naive:+.2f} nats"
            )
        return tuple(notes)

    @property
    def _levels(self) -> tuple[str, ...]:
        """Which level of a multilevel model was reduced, and which was not."""
        left = [site.name for site in self.sites if site.note.endswith(OTHER_LEVEL)]
        if not left or not self.scores:
            return ()
        reduced, whole = (", ".join(map(repr, names)) for names in (self.scores, left))
        return (
            f"the lower level was reduced, {reduced}; the level above it was left, {whole}: "
            f"sites={left} reduces that instead",
        )

    def _elements(self, name: str) -> dict[str, Tensor]:
        delta_f = self.scores[name]
        whole = torch.ones_like(delta_f, dtype=torch.bool)
        mask, kept = (
            by_site.get(name, whole) for by_site in (self.model.masks.by_site(), self.masks)
        )
        # What was pruned before has the score 0.
        present = torch.where(~mask & (delta_f == 0), 0.0, torch.sigmoid(delta_f))
        known = {"delta_f": delta_f, "inclusion_probability": present, "mask": mask}
        return known if torch.equal(mask, kept) else known | {"keeps_prior": kept}
