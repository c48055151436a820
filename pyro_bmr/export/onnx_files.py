"""Out of torch: a network as a file for ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_bmr.arguments.checks import check_path
from pyro_bmr.export.agreement import relative_error
from pyro_bmr.export.modules import export_program
from pyro_bmr.files.whole_files import replace_file
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.calls import Call, read_call
from pyro_bmr.programs.data import convert_data
from pyro_bmr.programs.failures import running
from pyro_bmr.programs.pairs import read_pair


@alone("export_onnx")
def export_onnx(
    program: Any,
    path: str | Path,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int | None = None,
    output: str | None = None,
    seed: int = 0,
) -> None:
    """Write a network to a file that ONNX Runtime runs, without Pyro, torch or this package.

    The file is read again and run on ``args`` and on another number of data before it takes its
    place, so that a file of that name gives the outputs of the network.

    Parameters
    ----------
    program : Module, Reduction or tuple
        What `to_module` returned; or what `reduce` or `prune` did, or ``(model, guide)``.
    path : str or Path
        The file. Another of its name is replaced at once, when it is whole.
    *args
        What to call the module with, or the model; the tensors among them are the inputs.
    kwargs, num_samples, output, seed : optional
        As of `to_module`, for a model and a guide.

    Raises
    ------
    ImportError
        If ONNX or ONNX Runtime is not installed.
    ValueError
        If ONNX Runtime's outputs differ by more than 1e-5 of their size.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/layer.onnx"
    >>> export_onnx(nn.Linear(2, 1).eval(), path, torch.zeros(4, 2))
    """
    missing = [name for name in _ONNX if find_spec(name) is None]
    if missing:
        msg = (
            f"{', '.join(missing)} not found. Expected them for ONNX: pip install pyro-bmr[export]"
        )
        raise ImportError(msg)
    check_path(path)
    module: Any = program
    if isinstance(program, nn.Module) and (kwargs or output or num_samples is not None):
        msg = (
            "got a module with kwargs=, num_samples= or output=. Expected these for a model and "
            "its guide: a module has what it was made with, and takes its inputs by position"
        )
        raise ValueError(msg)
    if not isinstance(program, nn.Module):
        options: Any = {"num_samples": num_samples, "output": output, "seed": seed}
        module, args = export_program(*read_pair(program), args, kwargs=kwargs, **options)
    else:
        args, _ = convert_data(module, None, args, None)
        with running("the module", args, {}, "the inputs that it takes"), torch.no_grad():
            module(*args)
    call = read_call(module, args, None)
    samples = [call.tensors, *_other_sizes(module, call)]
    batch = torch.export.Dim("batch") if len(samples) > 1 else None
    with _quiet():
        exported: Any = torch.onnx.export(
            module,
            tuple(samples[-1]),
            input_names=list(call.names),
            dynamic_shapes=[{0: batch} if b and batch else None for b in call.batched],
            dynamo=True,
            verbose=False,
        )
    with replace_file(path) as unfinished:
        exported.save(str(unfinished), external_data=False)
        for inputs in samples:
            _check_onnx(unfinished, module, inputs)


_ONNX = ("onnx", "onnxruntime", "onnxscript")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's exporter says of itself and of packages that are not used."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Inputs with the same number of data share its name.
            warnings.filterwarnings("ignore", "# The axis name")
            yield
    finally:
        logger.setLevel(level)


def _other_sizes(module: nn.Module, call: Call) -> list[list[Tensor]]:
    """Return inputs of another number of data, unless the module takes only one number."""
    inputs = call.inputs(5 if call.size != 5 else 4)
    try:
        with torch.no_grad():
            module(*inputs)
    except RuntimeError:
        return []
    return [inputs]


@torch.no_grad()
def _check_onnx(path: Path, module: nn.Module, inputs: Sequence[Tensor]) -> None:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as reason:
        msg = (
            f"ONNX Runtime cannot run the network ({type(reason).__name__}: {reason}), so there is "
            "no file. Expected operations and dtypes that it has: torch.float32, which is "
            "guide.float() before reducing, and no torch.autocast"
        )
        raise ValueError(msg) from reason
    feed = zip(session.get_inputs(), inputs, strict=True)
    found = session.run(None, {place.name: t.cpu().numpy() for place, t in feed})
    expected = [t for t in pytree.tree_leaves(module(*inputs)) if isinstance(t, Tensor)]
    error = relative_error(expected, [torch.from_numpy(value) for value in found])
    if not error <= 1e-5:
        msg = (
            f"ONNX Runtime's outputs differ from those of torch by {error:.1e} of their size, so "
            "that there is no file. Expected at most 1e-5: please report the network"
        )
        raise ValueError(msg)
