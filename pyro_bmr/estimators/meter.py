"""Measuring F of programs that differ in what is pruned, on the same rows and random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_bmr.estimators.elbos import UnbiasedELBO
from pyro_bmr.estimators.parts_of_rows import (
    BLOCK,
    adds_up,
    count_parts,
    count_rows,
    find_plates,
)
from pyro_bmr.guides.common_noise import CommonNoise, NoiseCoupling, draw_noise
from pyro_bmr.programs.batched_draws import evaluate_at_once
from pyro_bmr.programs.batches import Batches, BatchModel
from pyro_bmr.programs.calls import without_inference_mode
from pyro_bmr.programs.dry_run import dry_run
from pyro_bmr.programs.given_values import ValueMessenger
from pyro_bmr.programs.pairs import Pair
from pyro_bmr.programs.rank_checks import check_shards
from pyro_bmr.programs.ranks import ONE, Ranks
from pyro_bmr.programs.site_kinds import is_latent
from pyro_bmr.programs.streams import Stream

Gradient = tuple[dict[str, Tensor], ...]

_T = TypeVar("_T")


class Meter:
    """Estimates F of similar programs, so that estimates can be subtracted from each other.

    Estimate :math:`i` is of the same rows and random numbers for every program. Rows of eight
    batches or more are measured a batch at a time, by a block of estimates: ``parts`` estimates in
    a row take each row once, and each by itself has the expectation F. So are those of a
    ``stream``, of whose rows the arguments are but an example. ``example`` is one of the programs.
    Nothing outside is changed.
    """

    def __init__(
        self,
        example: Pair,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batch_size: int,
        seed: int,
        stream: Stream | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        args, kwargs = without_inference_mode(args, kwargs)
        self._args, self._kwargs, self._seed = args, kwargs, seed
        self._pair, self._indices = example, dict[str, Tensor]()
        self._elbo = UnbiasedELBO()
        self._batches = Batches(args, kwargs, None)
        self._batch_model: Callable[..., Any] = self._model
        self._plate = ""
        self._rows, self._size, self.parts = 1, 1, 1
        self._stream, self.ranks, self.batch_size = stream, ranks, batch_size
        with poutine.block(), torch.no_grad():
            plates = find_plates(example, self._batches, batch_size)
            if stream is not None:
                self._batches = stream.batches
                self._batch_model = BatchModel(self._model, stream.batches)
                self._rows = stream.batches.size
                self.parts = math.ceil(self._rows / (stream.batches.batch_size or 1))
            elif ranks.size > 1:
                self._rows, self.parts = self._split_rows_of_ranks(plates)
            elif plates:
                self._plate, sizes = max(plates.items(), key=lambda plate: plate[1])
                self._rows, self._size = sizes
                self.parts = math.ceil(self._rows / self._size)
            else:
                self._rows, self.parts = self._split_arguments()
        self._rows_of_ranks = set(ranks.gather(self._rows))
        self._is_finite = True
        self._at_once = not self._plate and stream is None
        with poutine.block(), torch.no_grad(), dry_run(*example):
            first_args, first_kwargs = self._take(0)
            self._elbo.learn(self._batch_model, self._guide, *first_args, **first_kwargs)
        self._check_same_sites()

    def again(self, seed: int) -> Meter:
        """Return a meter of the same rows that has other random numbers."""
        other = copy(self)
        other._seed, other._indices, other._elbo = seed, {}, UnbiasedELBO()
        other._batch_model = other._model
        if isinstance(self._batch_model, BatchModel):
            other._batch_model = self._batch_model.of(other._model)
        return other

    def measure(
        self, pair: Pair, start: int, stop: int, couplings: Mapping[str, NoiseCoupling]
    ) -> Tensor:
        """Return estimates of F from ``start`` to before ``stop``, in nats, float64, on the CPU.

        Both are multiples of `BLOCK`.
        """

        def run() -> Tensor:
            blocks = self._run_blocks(pair, start, stop, couplings)
            nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
            return torch.cat([nothing, *(block.cpu() for block in blocks)])

        with torch.no_grad():
            draws = self._run_alike(run)
        self._is_finite = bool(draws.isfinite().all())
        return torch.stack(self.ranks.gather(draws, f"estimates {start} to {stop}")).mean(0)

    def raise_not_finite(self, what: str) -> NoReturn:
        """Raise a ValueError of estimates that are NaN or infinite, in the rank where they are."""
        error = ValueError(
            f"the free energy {what} is NaN or infinite. Expected a finite one: look for NaN in "
            "the data, or for observations that the model cannot make"
        )
        self.ranks.raise_first(None if self._is_finite else error)
        raise error

    def differentiate(
        self, pair: Pair, count: int, couplings: Mapping[str, NoiseCoupling]
    ) -> tuple[Gradient, Gradient]:
        """Average the gradient of F over each half of some estimates.

        By part of the guide, a `PrunedGuide`, and by name of its unconstrained parameters.
        """
        guide: Any = pair[1]
        parts = [dict(part.named_parameters()) for part in guide.parts]
        parameters = [parameter for part in parts for parameter in part.values()]

        def run() -> list[list[Tensor]]:
            halves = [[torch.zeros_like(one) for one in parameters] for _ in range(2)]
            for draws in self._run_blocks(pair, 0, count, couplings):
                for half, some in zip(halves, draws.chunk(2), strict=True):
                    found = torch.autograd.grad(
                        2 * some.sum() / count, parameters, allow_unused=True, retain_graph=True
                    )
                    for total, one in zip(half, found, strict=True):
                        total += 0 if one is None else one
            return halves

        with torch.enable_grad():
            halves = self._run_alike(run)
        first, second = (
            tuple({name: next(ahead) for name in part} for part in parts)
            for ahead in (iter(self.ranks.average_all(half)) for half in halves)
        )
        return first, second

    def _run_alike(self, run: Callable[[], _T]) -> _T:
        """Run once more, one draw at a time, if vmap follows a program in some ranks only."""
        before = self._at_once
        found = run()
        if before and len(set(self.ranks.gather(self._at_once, "how draws were taken"))) > 1:
            self._at_once = False
            found = run()
        return found

    def _run_blocks(
        self, pair: Pair, start: int, stop: int, couplings: Mapping[str, NoiseCoupling]
    ) -> Iterator[Tensor]:
        self._pair = pair
        # What remains of a correlated posterior may be nothing, so that statements differ.
        if couplings:
            self._elbo = UnbiasedELBO()
        wants_gradients = torch.is_grad_enabled()
        with poutine.block(), dry_run(*pair):
            args, kwargs = self._take(0)
            with torch.set_grad_enabled(False):
                self._elbo.learn(self._batch_model, self._guide, *args, **kwargs)
            for block in range(start // BLOCK, stop // BLOCK):
                with torch.set_grad_enabled(wants_gradients):
                    yield self._run_block(block, couplings)

    def _run_block(self, block: int, couplings: Mapping[str, NoiseCoupling]) -> Tensor:
        cells = range(block * BLOCK, (block + 1) * BLOCK)
        noise = [draw_noise(couplings, _to_seed(self._seed, cell)) for cell in cells]
        # Without rows of their own, all take all.
        parted = self._at_once and self.parts > 1
        rows = [self._pick_rows(cell) for cell in cells] if parted else []
        if self._at_once and self._are_of_one_size(cells):
            stacked = {name: torch.stack([one[name] for one in noise]) for name in couplings}
            try:
                _set_seed(_to_seed(self._seed, block))
                return self._run_at_once(stacked, rows).double()
            except Exception:
                # Other random numbers from here on, of all that is compared.
                self._at_once = False
        draws = []
        for cell, one in zip(cells, noise, strict=True):
            _set_seed(_to_seed(self._seed, cell))
            draws.append(self._run(one, *self._take(cell)))
        return torch.stack(draws).double()

    def _are_of_one_size(self, cells: range) -> bool:
        """Tell whether estimates take as many rows each, in every rank."""
        larger = [
            {cell % self.parts < rows % self.parts for cell in cells}
            for rows in self._rows_of_ranks
        ]
        return all(len(sizes) == 1 for sizes in larger)

    def _run_at_once(self, noise: Mapping[str, Tensor], rows: Sequence[Tensor]) -> Tensor:
        batches = self._batches.take(torch.stack(list(rows))) if rows else ()
        names = [f"rows of argument {i}" for i in range(len(batches))]

        def run(one: Mapping[str, Tensor]) -> Tensor:
            batch = tuple(one[name] for name in names)
            taken = self._batches.arguments(batch) if rows else (self._args, self._kwargs)
            return self._run(one, *taken)

        return evaluate_at_once(run, {**noise, **dict(zip(names, batches, strict=True))}, BLOCK)

    def _run(
        self, noise: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        with CommonNoise(noise):
            terms = self._elbo.differentiable_terms(self._batch_model, self._guide, *args, **kwargs)
        return terms[0] - terms[1]

    def _take(self, cell: int) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if self.parts == 1 and not self._plate and self._stream is None:
            return self._args, self._kwargs
        if self._plate:
            self._indices = {self._plate: self._pick_rows(cell)}
            return self._args, self._kwargs
        read = self._batches.take if self._stream is None else self._stream.read
        return self._batches.arguments(read(self._pick_rows(cell)))

    def _pick_rows(self, cell: int) -> Tensor:
        passes, part = divmod(cell, self.parts)
        order = _shuffle(self._rows, passes)
        if not self._plate:
            return order.tensor_split(self.parts)[part]
        # A plate always takes as many rows; where they do not go up, some come twice.
        start = part * self._size
        return order[torch.arange(start, start + self._size, device="cpu") % self._rows]

    def _split_arguments(self) -> tuple[int, int]:
        """Split the rows of all tensors among the arguments, if the likelihood is a sum over them.

        Returns their number, and how many parts they are in.
        """
        rows = count_rows(self._batches)
        parts = count_parts(rows, self.batch_size)
        if parts > 1:
            with suppress(ValueError):
                batches = Batches(self._args, self._kwargs, math.ceil(rows / parts))
                batch_model = BatchModel(self._model, batches)
                if adds_up(self._pair, batches):
                    self._batches, self._batch_model = batches, batch_model
                    return rows, parts
        return 1, 1

    def _split_rows_of_ranks(self, plates: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """Split the rows of each rank into as many parts as the one with most rows needs.

        Returns the number of rows in this one, and how many parts they are in.
        """
        Batches(self._args, self._kwargs, 1).check()
        own = count_rows(self._batches)
        rows = self.ranks.gather_rows(own)
        parts = min(max(count_parts(count, self.batch_size) for count in rows), *rows)
        model = self._stand_for_all(own, parts, rows)
        if parts > 1:
            scales_itself = bool(plates) or not model.scaled
            can_be_split = not scales_itself and adds_up(self._pair, model.batches)
            if not all(self.ranks.gather(can_be_split)):
                parts, model = 1, self._stand_for_all(own, 1, rows)
        self._batches, self._batch_model = model.batches, model
        return own, parts

    def _stand_for_all(self, own: int, parts: int, rows: Sequence[int]) -> BatchModel:
        """Let a part of the own rows stand for those of all ranks, each of which has so many."""
        batches = Batches(self._args, self._kwargs, math.ceil(own / parts))
        model = BatchModel(self._model, batches, rows)
        check_shards(model, self.ranks)
        return model

    def _check_same_sites(self) -> None:
        """Raise an error that names the latent sites that are not the same in all ranks."""
        if self.ranks.size == 1:
            return
        args, kwargs = self._take(0)
        with poutine.block(), torch.no_grad(), dry_run(*self._pair):
            _set_seed(0)
            guide = poutine.trace(self._guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(self._model, trace=guide)
            model = poutine.trace(replayed).get_trace(*args, **kwargs)
        terms = {
            f"{name!r} of {what}": [node["value"], node["fn"].log_prob(node["value"])]
            for what, trace in (("the guide", guide), ("the model", model))
            for name, node in trace.nodes.items()
            if is_latent(node) and name in guide.nodes
        }
        self.ranks.check_values(
            terms,
            "draws or densities of",
            "the same parameters in all ranks, and priors that do not depend on the rows of one",
        )

    def _model(self, *args: Any, **kwargs: Any) -> Any:
        with ValueMessenger(self._indices):
            return self._pair[0](*args, **kwargs)

    def _guide(self, *args: Any, **kwargs: Any) -> Any:
        with ValueMessenger(self._indices):
            return self._pair[1](*args, **kwargs)


@lru_cache(maxsize=2)
def _shuffle(rows: int, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(rows, generator=generator, device="cpu")


def _to_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) % 2**31


def _set_seed(seed: int) -> None:
    """Seed all generators."""
    # torch.manual_seed takes milliseconds, since it also tells devices that are not in use.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)
