"""Guides that many processes train together, found by the names of their types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro_bmr.programs.dry_run import find_modules

_REPLICATED = (
    "in each process it counts only the rows of that process against the whole prior, so that the "
    "posterior is too wide by the square root of their number. Expected a guide of one process: "
    "train guide.module by fit(..., mesh=mesh), or on all rows in one process; one that was "
    "trained with observations scaled by the number of processes can be passed as guide.module"
)
_SPLIT = (
    "each process holds only a part of its parameters. Expected a guide of one process, with all "
    "of them: make an ordinary guide, call it once, and load the full state dict into it "
    "(torch.distributed.checkpoint.state_dict, full_state_dict=True)"
)
# Types of torch.distributed, of which a build of torch may have none.
_REMEDIES = {
    "DistributedDataParallel": _REPLICATED,
    "FullyShardedDataParallel": _SPLIT,
    "FSDPModule": _SPLIT,
    "DTensor": _SPLIT,
}


def check_one_process(guide: Any) -> None:
    """Raise a TypeError if a guide is, or has in it, what many processes train together."""
    for part in _find_parts(guide):
        for kind in type(part).__mro__:
            if kind.__name__ in _REMEDIES and kind.__module__.split(".")[0] == "torch":
                msg = f"got a guide with a {kind.__name__}: {_REMEDIES[kind.__name__]}"
                raise TypeError(msg)


def _find_parts(guide: Any) -> Iterator[Any]:
    for root in find_modules(guide):
        yield from root.modules()
        yield from root.parameters()
        yield from root.buffers()
