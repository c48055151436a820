"""`by_free_energy`: drop what the evidence says, as long as the measured free energy falls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from pyro_bmr.arguments.checks import check_switch, read_count, read_seed
from pyro_bmr.display import progress_bar
from pyro_bmr.factors.vanishing import vanishes
from pyro_bmr.mathematics.subset_search import search_best
from pyro_bmr.selection.flags import NOISE
from pyro_bmr.selection.scores import Scores
from pyro_bmr.selection.selections import Selection, read_margin
from pyro_bmr.selection.trials import Trials


def by_free_energy(
    margin: float = 0.0,
    *,
    num_samples: int = 32,
    batch_size: int = 2_000,
    effort: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    r"""Drop what lowers the free energy as measured on the data, guided by the evidence.

    What the evidence says is tried first, all of it at once:

    .. math:: \Delta F = E_q[\ln p(y \mid \theta)] - E_{q'}[\ln p(y \mid \theta)]
              + KL(q' \,\|\, p') - KL(q \,\|\, p)

    with the same random numbers on both sides. Where that agrees with the prediction, it goes.
    Where it does not, because the guide is not the posterior, chunks of the order of the evidence
    go one after the other, each only if the measured free energy falls; the evidence of what is
    left is corrected by the gradient of the free energy after each, and a chunk that is refused
    is tried in parts. At last, larger parts of the order of the evidence are tried. Positive items,
    of which the evidence is an estimate, are each measured first if they are few.

    Parameters
    ----------
    margin : float
        In nats, as in `by_evidence`.
    num_samples : int
        How many estimates of F there are at most while a decision is open, 4 or more; as many as
        take all rows once, where that is more.
    batch_size : int
        Where there are eight times as many rows or more, so many are measured at a time, for four
        estimates, if the log likelihood is a sum over rows.
    effort : int
        How many trials there are at most; one that stays open for long counts more than once.
    seed : int
        Of all random numbers; those outside are left as they are.
    progress : bool
        Show a progress bar, if there is a terminal or a notebook.

    Returns
    -------
    callable
        From ``Scores`` to masks.

    Raises
    ------
    ValueError
        If an option makes no sense. From `pyro_bmr.reduce`: if it was given no data, or if a free
        energy is not finite.

    References
    ----------
    Beckers et al. (2022), arXiv:2210.09134, eq. 12; Opper & Archambeau (2009), "The variational
    Gaussian approximation revisited", Neural Computation 21(3), eq. 9, for the correction.

    Examples
    --------
    A guide that stands where it began knows nothing of the data, but measuring tells:

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> from pyro_bmr import reduce
    >>> def model(x, y):
    ...     w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
    >>> x = torch.eye(2).repeat(50, 1)
    >>> y = x @ torch.tensor([1.0, 0.0])
    >>> start = lambda site: torch.tensor([0.3, 0.3])
    >>> guide = AutoNormal(model, init_loc_fn=start, init_scale=0.3)
    >>> _ = guide(x, y)
    >>> reduce(guide, x, y).masks["w"], reduce(guide).masks["w"]
    (tensor([ True, False]), tensor([False, False]))
    """
    margin = read_margin(margin, "by_free_energy")
    num_samples = read_count("num_samples", num_samples, 4)
    batch_size, effort = read_count("batch_size", batch_size), read_count("effort", effort)
    seed = read_seed(seed)
    check_switch("progress", progress)

    def select(scores: Scores) -> Mapping[str, Tensor]:
        if scores.decision is None:
            msg = (
                "by_free_energy has nothing to measure. Expected the data, which the model "
                "observes, as in reduce(guide, x, y, select=by_free_energy()); by_evidence() needs "
                "none"
            )
            raise ValueError(msg)
        if not scores.delta_f:
            return {}
        trials = Trials(scores.decision, num_samples, batch_size, seed)
        search = _Search(scores, trials, margin, effort)
        with progress_bar("trials", progress) as bar:
            task = bar.add_task("measuring", total=effort, note="")
            for total in search.run():
                bar.update(task, completed=min(trials.count, effort), note=f"ΔF = {total:+.1f}")
        return scores.without_unread(search.confirmed(seed + 1))

    return select


# Of a chunk, which part of the corrected evidence has to come true; the rest is in its elements.
_GOAL = 0.75
# A chunk that is refused is tried in so many parts; the one after a success is so much larger.
_PARTS = 4
# Of the order of the evidence, what is tried at last; a third of the effort is kept for that.
_PREFIXES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
_AT_LAST = 1 / 3
# Standard errors by which a measurement has to contradict the evidence.
_ERRORS = 3.0
# A part of what F has fallen by that is not worth more trials.
_NEGLIGIBLE = 1e-3


class _Search:
    """What is kept of all items, and what has been refused; items are numbered over all names."""

    def __init__(self, scores: Scores, trials: Trials, margin: float, effort: int) -> None:
        self.scores, self.trials, self.margin, self.effort = scores, trials, margin, effort
        self.kept = self._flat(scores.kept)
        self.refused = torch.zeros_like(self.kept)
        self.history = [self.kept]

    def run(self) -> Iterator[float]:
        """Search; yields the ΔF that is reached after each trial, in nats."""
        evidence = self._flat(self.scores.search(search_best, self.margin)) & self.kept
        self._try_evidence(evidence)
        yield from self._follow_gradient(round((1 - _AT_LAST) * self.effort))
        for kept in (evidence, *self._prefixes()):
            if torch.equal(kept, self.kept):
                continue
            if self.trials.count >= self.effort:
                return
            accepted = self._try_keeping(kept, 0.0, doubt=-_ERRORS)
            yield self.trials.total()[0]
            if accepted:
                self.refused[:] = False
                yield from self._follow_gradient(self.effort)

    def confirmed(self, seed: int) -> dict[str, Tensor]:
        """Return the masks; with other random numbers, the last ones that do not raise F."""
        mean, error = self.trials.total()
        if len(self.history) == 1 or mean < -5 * error:
            return self._masks(self.kept)
        fresh = self.trials.again(seed)
        for kept in reversed(self.history[1:]):
            mean, error = fresh.measure(self._elements(kept), errors=_ERRORS)
            if mean <= 0:
                return self._masks(kept)
        return self._masks(self.history[0])

    def _try_evidence(self, kept: Tensor) -> None:
        """Drop what the evidence says if F falls as far as predicted."""
        if torch.equal(kept, self.kept):
            return
        predicted = self.scores.joint_delta_f(self._masks(kept))
        around = predicted - NOISE, predicted + NOISE
        mean, error = self.trials.measure(self._elements(kept), around, errors=_ERRORS)
        if abs(mean - predicted) <= NOISE + _ERRORS * error:
            self._accept(kept)

    def _follow_gradient(self, effort: int) -> Iterator[float]:
        size, seen = len(self.kept), -1
        while self.trials.count < effort:
            importance, evidence = self._importance()
            order = importance.argsort()
            count = int((importance < 0).sum())
            worthwhile = max(NOISE, _NEGLIGIBLE * abs(self.trials.total()[0]))
            if float(importance[order[:count]].sum()) > -worthwhile:
                # What was refused is looked at once more, if others have gone since.
                if int(self.refused.sum()) in {0, seen}:
                    return
                seen = int(self.refused.sum())
                self.refused[:] = False
                continue
            size, at, accepted = min(size, count), 0, False
            while at < count and self.trials.count < effort and not accepted:
                chunk = order[at : at + size]
                kept = self.kept.clone()
                kept[chunk] = False
                goal = _GOAL * float(importance[chunk].sum()) if len(chunk) > 1 else 0.0
                # Measuring may contradict the evidence, but has to prove it.
                doubt = _ERRORS if float(evidence[chunk].sum()) < 0 else -_ERRORS
                accepted = self._try_keeping(kept, goal, doubt)
                yield self.trials.total()[0]
                if accepted:
                    size = _PARTS * len(chunk)
                elif len(chunk) == 1:
                    self.refused[chunk] = True
                    at, size = at + 1, _PARTS
                else:
                    size = max(1, len(chunk) // _PARTS)

    def _importance(self) -> tuple[Tensor, Tensor]:
        """Return by item what dropping it costs in nats, and what of that the evidence says."""
        able = self.kept & ~self.refused & self._able
        if self._vanishing and 2 * int(able.sum()) <= self.effort - self.trials.count:
            alone = self._measure_alone(able)
            return alone, alone
        now = self.scores.given(self._masks(self.kept))
        evidence = self._flat(now.elimination()).double() + self.margin * self._sizes
        shift = self._flat(now.item_sums(self.trials.first_order())).double()
        importance = torch.where(able, evidence + shift, torch.inf).nan_to_num(nan=torch.inf)
        return importance, evidence

    def _measure_alone(self, able: Tensor) -> Tensor:
        """Measure what dropping each of a few items by itself costs in nats."""
        alone = torch.full_like(self._sizes, torch.inf)
        for item in able.nonzero()[:, 0]:
            kept = self.kept.clone()
            kept[item] = False
            alone[item] = self.trials.measure(self._elements(kept), around=())[0]
        return alone + self.margin * self._sizes

    def _prefixes(self) -> Iterator[Tensor]:
        """Keep all but larger and larger parts of the order of the evidence."""
        evidence = torch.where(self._able, self._flat(self.scores.elimination()), torch.inf)
        order = evidence.argsort()[: int(self._able.sum())]
        for part in _PREFIXES:
            kept = self.history[0].clone()
            kept[order[: round(part * len(order))]] = False
            yield kept

    def _try_keeping(self, kept: Tensor, goal: float, doubt: float) -> bool:
        """Go to ``kept`` if ΔF is measured to be below ``goal``, given a doubt in errors."""
        dropped = self.kept & ~kept
        price = self.margin * float(
            self._sizes[dropped].sum() - self._sizes[kept & ~self.kept].sum()
        )
        mean, error = self.trials.measure(self._elements(kept), (goal - price,))
        slack = NOISE if doubt < 0 else 0.0
        if mean + price > goal + doubt * error - slack:
            return False
        self._accept(kept)
        return True

    def _accept(self, kept: Tensor) -> None:
        self.trials.accept()
        self.kept = kept
        self.history.append(kept)

    @cached_property
    def _vanishing(self) -> bool:
        """Whether the evidence of some is but an estimate."""
        factors = self.trials.start.factors
        return any(vanishes(prior) for factor in factors for prior in factor.priors.values())

    @cached_property
    def _able(self) -> Tensor:
        return ~self._flat(self.scores.delta_f).isposinf()

    @cached_property
    def _sizes(self) -> Tensor:
        """How many elements an item has."""
        ones = {name: torch.ones_like(one) for name, one in self.trials.start.masks.items()}
        return self._flat(self.scores.item_sums(ones)).double()

    def _elements(self, kept: Tensor) -> dict[str, Tensor]:
        return self.scores.element_masks(self._masks(kept))

    def _masks(self, kept: Tensor) -> dict[str, Tensor]:
        like = self.scores.delta_f
        parts = kept.split([one.numel() for one in like.values()])
        return {n: part.reshape(like[n].shape) for n, part in zip(like, parts, strict=True)}

    def _flat(self, by_name: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([by_name[name].reshape(-1) for name in self.scores.delta_f])
