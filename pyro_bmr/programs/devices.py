"""Which device a model, its guide and its data are on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.programs.dry_run import find_modules


@contextmanager
def explained_devices(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Say what is on which device, if torch stops because there are several."""
    try:
        yield
    except RuntimeError as error:
        held = {
            "the model": [t for module in find_modules(model) for t in _tensors(module)],
            "the guide": [t for module in find_modules(guide) for t in _tensors(module)],
            "the param store": [t for _, t in pyro.get_param_store().named_parameters()],
            "the arguments": pytree.tree_leaves((args, dict(kwargs))),
        }
        devices = {
            what: sorted({str(t.device) for t in tensors if isinstance(t, Tensor) and t.dim()})
            for what, tensors in held.items()
        }
        several = len({device for on in devices.values() for device in on}) > 1
        if not (several and any(word in str(error) for word in ("device", "meta"))):
            raise
        found = ", ".join(f"{what} on {' and '.join(on)}" for what, on in devices.items() if on)
        reason = str(error).partition("\n")[0]
        msg = (
            f"got {found}, and torch refuses: {reason}. Expected all on one device: "
            "model.to(device), guide.to(device), x.to(device), and what a model makes by itself, "
            "as in torch.zeros(3, device=x.device)"
        )
        raise RuntimeError(msg) from error


def _tensors(module: Any) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
