"""What stands where a program would, if there is none."""

from __future__ import annotations

from typing import Any


class NoProgram:
    """Takes the place of the model of moments from elsewhere, and says that there is none."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise the ValueError that says so."""
        check_program(self)

    def to(self, _device: Any) -> NoProgram:
        """Return itself: there is nothing to move."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        check_program(self)

    def __repr__(self) -> str:
        return "NoProgram()"


def check_program(model: Any) -> None:
    """Raise a ValueError if there is no model."""
    if isinstance(model, NoProgram):
        raise ValueError(_NO_PROGRAM)  # noqa: TRY004


_NO_PROGRAM = (
    "this is the reduction of a Posterior, of moments without a program. Expected a guide and its "
    "Pyro model for what runs one, or Posterior(...) with model= of the prior; the reduced moments "
    "are result.guide"
)
