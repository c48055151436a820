"""Draws from the prior of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_bmr.programs.batched_draws import LargestTensor, evaluate
from pyro_bmr.programs.dry_run import dry_run


@torch.inference_mode(False)
@torch.no_grad()
def draw_prior(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    sites: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run a model as it is, many times at once; the values wanted have the shape ``(S, *site)``.

    The model, the param store and the random number generators are left as they were. A prior that
    cannot be drawn from is a ValueError.
    """

    def run(_: Any = None) -> Trace:
        return poutine.trace(model).get_trace(*args, **kwargs)

    with dry_run(model), torch.no_grad():
        torch.manual_seed(seed)
        try:
            with LargestTensor() as seen:
                nodes = run().nodes
        except NotImplementedError as error:
            msg = (
                "the prior has a distribution that cannot be drawn from, such as ImproperUniform "
                f"({str(error).partition(chr(10))[0]}). Expected one that can, or prior=False"
            )
            raise ValueError(msg) from error
        return evaluate(
            lambda _: {
                name: value["value"] for name, value in run().nodes.items() if name in sites
            },
            {"draw": torch.arange(num_samples, device="cpu")},
            largest=max(seen.elements, sum(nodes[name]["value"].numel() for name in sites)),
            seed=seed,
            what="model, to draw from its prior,",
        )
