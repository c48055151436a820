"""What torch refuses, said of the model, the guide and the data: devices and dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bmr.programs.dry_run import find_modules


@contextmanager
def explained_refusals(
    model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Say what is where if torch stops at several devices, a short dtype, or inference mode.

    These are RuntimeErrors here as in torch.
    """
    try:
        yield
    except RuntimeError as error:
        held = {
            "the model": _tensors_of(model),
            "the guide": _tensors_of(guide),
            "the param store": [t for _, t in pyro.get_param_store().named_parameters()],
            "the arguments": pytree.tree_leaves((args, dict(kwargs))),
        }
        tensors = {what: [t for t in some if isinstance(t, Tensor)] for what, some in held.items()}
        describe = (_describe_devices, _describe_dtypes, _describe_inference)
        msg = next(filter(None, (one(str(error), tensors) for one in describe)), "")
        if not msg:
            raise
        raise RuntimeError(msg) from error


def _describe_devices(error: str, tensors: Mapping[str, list[Tensor]]) -> str:
    devices = {
        what: sorted({str(one.device) for one in some if one.dim()})
        for what, some in tensors.items()
    }
    several = len({device for on in devices.values() for device in on}) > 1
    if not (several and re.search("device|meta", error)):
        return ""
    found = ", ".join(f"{what} on {' and '.join(on)}" for what, on in devices.items() if on)
    return (
        f"got {found}, and torch refuses: {_first_line(error)}. Expected all on one device: "
        "model.to(device), guide.to(device), x.to(device), and what a model makes by itself, "
        "as in torch.zeros(3, device=x.device)"
    )


def _describe_dtypes(error: str, tensors: Mapping[str, list[Tensor]]) -> str:
    if not re.search("not implemented for '(BFloat16|Half)'", error):
        return ""
    found = ", ".join(
        f"{what} in {' and '.join(sorted({str(one.dtype) for one in some}))}"
        for what, some in tensors.items()
        if some
    )
    return (
        f"got {found}, in which torch lacks what this guide needs: {_first_line(error)}. Expected "
        "torch.float32 or torch.float64 where elements are correlated: guide.float(), x.float()"
    )


def _describe_inference(error: str, tensors: Mapping[str, list[Tensor]]) -> str:
    if "nference tensor" not in error:
        return ""
    made = [what for what, some in tensors.items() if any(one.is_inference() for one in some)]
    return (
        f"got {' and '.join(made) or 'tensors'} made in torch.inference_mode(), which torch does "
        f"not differentiate: {_first_line(error)}. Expected a model and a guide that are made, and "
        "called for the first time, outside of it; torch.no_grad() does no harm"
    )


def _tensors_of(program: Any) -> list[Tensor]:
    return [
        tensor
        for module in find_modules(program)
        for tensor in (*module.parameters(), *module.buffers())
    ]


def _first_line(error: str) -> str:
    return error.partition("\n")[0]
