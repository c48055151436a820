"""What a result can do to leave Pyro, or the process: modules, ONNX, files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pyro_bmr.arguments.checks import check_path
from pyro_bmr.export.modules import to_module
from pyro_bmr.export.onnx_files import export_onnx
from pyro_bmr.files.moments import pack_moments
from pyro_bmr.files.packing import pack_program
from pyro_bmr.files.plans import write_plan
from pyro_bmr.guides.pruned_guide import PrunedGuide
from pyro_bmr.moments.no_program import check_program
from pyro_bmr.moments.posterior import Posterior
from pyro_bmr.programs.alone import alone
from pyro_bmr.programs.calls import check_call
from pyro_bmr.programs.data import convert_data
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
        args, kwargs = self._example("to_module", args, kwargs)
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
        args, kwargs = self._example("export_onnx", args, kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "output": output, "seed": seed}
        export_onnx(self, path, *args, kwargs=kwargs, **options)

    @alone("save")
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
        check_path(path)
        if isinstance(self.guide, Posterior):
            moments = {"kind": "moments", "moments": pack_moments(self.guide)}
            write_plan(path, self._plan() | moments)
            return
        program = pack_program(self.model, self.guide, *self._given(args, kwargs))
        write_plan(path, program | self._plan())

    @abstractmethod
    def _plan(self) -> dict[str, Any]:
        """Return what a file holds beside the model and the guide, with its ``kind``."""

    def _example(
        self, verb: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the model is called with, and raise a TypeError if it cannot be."""
        args, kwargs = self._given(args, kwargs)
        origin = self.guide.origin
        expected = (
            f"an example of what it is called with, as in {verb}(x); a result that was loaded "
            "without one has none of its own"
        )
        check_call(origin.model or self.model, args, kwargs, expected)
        return args, kwargs

    def _given(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return these arguments, or else those that the guide was first called with."""
        check_program(self.model)
        args, keywords = convert_data(self.model, self.guide, args, kwargs)
        if args or keywords:
            return args, keywords
        return self.guide.origin.args, dict(self.guide.origin.kwargs)
