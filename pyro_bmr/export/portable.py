"""What a result can do to leave Pyro, or the process: modules, ONNX, files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pyro_bmr.export.modules import to_module
from pyro_bmr.export.onnx_files import export_onnx
from pyro_bmr.files.packing import pack_program
from pyro_bmr.files.plans import write_plan
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.programs.calls import read_signature
from pyro_bmr.programs.handlers import PrunedModel


class Portable(ABC):
    """A pruned model with its guide, ready to travel."""

    model: PrunedModel
    guide: PrunedGuide

    def to_module(
        self,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        num_samples: int | None = None,
        output: str | None = None,
        seed: int = 0,
    ) -> nn.Module:
        """Make a plain torch module that predicts; see `pyro_bmr.to_module`.

        Parameters
        ----------
        *args
            Of the model, as an example; those that it was made with otherwise.
        kwargs : mapping, optional
            Keyword arguments of the model.
        num_samples : int, optional
            How many draws from the posterior, in one batched forward; its location if None.
        output : str, optional
            What it returns, if not what the model does.
        seed : int
            Of the draws.

        Returns
        -------
        Module
            With nothing of Pyro in it.

        Raises
        ------
        TypeError
            If the model cannot be called with these arguments, or needs some and there are none,
            as after `pyro_bmr.load`.
        """
        args, kwargs = self._example(args, kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "output": output, "seed": seed}
        return to_module(self.model, self.guide, *args, kwargs=kwargs, **options)

    def export_onnx(
        self,
        path: str | Path,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        num_samples: int | None = None,
        output: str | None = None,
        seed: int = 0,
    ) -> None:
        """Write a file for ONNX Runtime, which is checked; see `pyro_bmr.export_onnx`.

        Parameters
        ----------
        path : str or Path
            The file.
        *args, kwargs, num_samples, output, seed
            As of `to_module`.
        """
        args, kwargs = self._example(args, kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "output": output, "seed": seed}
        export_onnx(self, path, *args, kwargs=kwargs, **options)

    def save(
        self,
        path: str | Path,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write to a file that `pyro_bmr.load` reads.

        It holds the guide, the masks and what else the reduction did to the model, the model's
        own parameters and buffers, and all that is printed; not the code of the model, its priors
        among that, nor data. The file replaces another of its name at once, when it is whole.

        Parameters
        ----------
        path : str or Path
            The file, in the format of safetensors.
        *args
            Of the model, which is run to find its parameters; those that it was made with
            otherwise.
        kwargs : mapping, optional
            Keyword arguments of the model.
        """
        if not (args or kwargs):
            args, kwargs = self.guide.origin.args, self.guide.origin.kwargs
        program = pack_program(self.model, self.guide, args, dict(kwargs or {}))
        write_plan(path, program | self._plan())

    @abstractmethod
    def _plan(self) -> dict[str, Any]:
        """Return what a file holds beside the model and the guide, with its ``kind``."""

    def _example(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the model is called with: these arguments, or else those of the guide."""
        origin = self.guide.origin
        if not (args or kwargs):
            args, kwargs = origin.args, origin.kwargs
        kwargs = dict(kwargs or {})
        try:
            read_signature(origin.model or self.model).bind(*args, **kwargs)
        except TypeError as error:
            msg = (
                f"got {len(args)} arguments and keywords {list(kwargs)} for the model: {error}. "
                "Expected an example of what it is called with, as in to_module(x); a result that "
                "was loaded without them has none of its own"
            )
            raise TypeError(msg) from error
        return args, kwargs
