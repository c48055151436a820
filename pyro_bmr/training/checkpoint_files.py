"""The file of a run that can be killed: which run it is of, and where that was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_bmr.files.plans import UnreadableError, read_plan, write_plan
from pyro_bmr.files.structure import Check, count, entries, mapping, one_of
from pyro_bmr.files.whole_files import check_file

_FORMAT = 5
# Until the third format, checkpoints were archives of torch.
_ARCHIVE = b"PK\x03\x04"


@dataclass(frozen=True)
class CheckpointFile:
    """A file that the function ``verb`` writes while it runs, and goes on from."""

    path: Path
    verb: str

    def read(self, content: Check) -> Saved | None:
        """Return what was written last; None if there is no file.

        A file that is damaged, or not a checkpoint, raises a ValueError.
        """
        if not check_file(self.path).exists():
            return None

        def check(plan: Any) -> None:
            mapping(_anything)(plan, "")
            one_of(self._kind)(plan.get("kind"), "/kind")
            other = plan.get("format") != _FORMAT
            parts = {"kind": _anything, "format": count, "run": mapping(_anything)}
            entries({**parts, "content": _anything if other else content})(plan, "")

        try:
            plan = read_plan(self.path, check)
        except UnreadableError as error:
            if self._begins() == _ARCHIVE:
                raise ValueError(self._other_format("an earlier format")) from error
            msg = (
                f"{self.path} could not be read as a checkpoint ({error.why}). Expected a file "
                f"that {self.verb}(checkpoint=...) wrote, and all of it; give another path, or "
                "remove the file"
            )
            raise ValueError(msg) from error
        if plan["format"] != _FORMAT:
            raise ValueError(self._other_format(f"the format {plan['format']}"))
        return Saved(self.path, plan["run"], plan["content"])

    def write(self, run: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Put new content, of the run that ``run`` tells from others, in the place of the old."""
        plan = {"kind": self._kind, "format": _FORMAT, "run": run, "content": content}
        write_plan(self.path, plan)

    def _begins(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(len(_ARCHIVE))

    def _other_format(self, found: str) -> str:
        return (
            f"{self.path} has {found}. Expected {_FORMAT}: resume it with the version of pyro-bmr "
            "that wrote it, or give another path"
        )

    @property
    def _kind(self) -> str:
        return f"checkpoint of {self.verb}"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    path: Path
    run: Mapping[str, Any]
    content: Any

    def check_run(self, run: Mapping[str, Any]) -> None:
        """Raise a ValueError if it is of another run."""
        differences = [
            f"{name} was {self.run.get(name)!r} and is {run.get(name)!r}"
            for name in sorted(self.run.keys() | run.keys())
            if _write_out(self.run.get(name)) != _write_out(run.get(name))
        ]
        if differences:
            msg = (
                f"{self.path} is of another run: {'; '.join(differences)}. Expected the same "
                "model, guide, data and options as before; give another path to start anew"
            )
            raise ValueError(msg)


def _write_out(value: Any) -> str:
    # Lists are what tuples become in a file, and NaN is NaN.
    return json.dumps(value, default=repr)


@contextmanager
def usable_content() -> Iterator[None]:
    """Turn what goes wrong as content is used, whatever it is, into a ValueError that says so."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        msg = (
            f"the checkpoint cannot be used ({type(error).__name__}: {error}). Expected one of the "
            "same model and guide; give another path, or remove the file"
        )
        raise ValueError(msg) from error


def _anything(_value: Any, _where: str) -> None:
    pass
