"""The tables of what is supported: ``python tests/supported/table.py`` writes them into their page.

Every cell is what happens when it is tried.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guide_cases
import prior_cases
import program_cases
import pyro
from pairs import Pair

import pyro_bmr as bmr

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "own-model.md"
TABLES = {
    "guide": guide_cases.CASES,
    "prior": prior_cases.CASES,
    "program": program_cases.CASES,
}
STEPS = ["`fit`", "`reduce`", "`audit`", "`reduce` without data", "`save`, `load`"]
QUIET = {"progress": False}


def main() -> None:
    page = PAGE.read_text()
    for name in TABLES:
        page = put_into(page, name, render(name))
    PAGE.write_text(page)


def render(name: str) -> str:
    """Try all cases of a table, and write down what happens."""
    rows = [[name, *STEPS, "left whole, or why not"]]
    rows += [[case, *try_case(make)] for case, make in TABLES[name].items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    return "\n".join(lines) + "\n"


def find_between(page: str, name: str) -> re.Match[str]:
    """Find the table of a page between its markers."""
    found = re.search(rf"(?<=<!-- {name}s -->\n\n).*?(?=\n<!-- end -->)", page, re.DOTALL)
    assert found, f"the page has no <!-- {name}s --> with an <!-- end -->"
    return found


def put_into(page: str, name: str, table: str) -> str:
    found = find_between(page, name)
    return page[: found.start()] + table + page[found.end() :]


def try_case(make: Callable[[], Pair]) -> list[str]:
    """Return the cells of a row: what each step does, and what is left whole, or why it failed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(make())
        return [*trial.try_steps(), "; ".join(dict.fromkeys(trial.why))]


class LeftWholeError(Exception):
    """All sites of a guide are left whole."""


@dataclass
class Trial:
    """What is tried with a pair, and why it failed or what was left whole."""

    pair: Pair
    why: list[str] = field(default_factory=list)

    def try_steps(self) -> Iterator[str]:
        pair, data = self.pair, {"kwargs": self.pair.kwargs}
        fitted = {"num_epochs": 3, "compile": False, **data, **QUIET}
        if callable(pair.guide):
            pair.guide(*pair.args, **pair.kwargs)
            fit = lambda: bmr.fit(pair.model, pair.guide, *pair.args, **fitted)  # noqa: E731
            yield self._attempt({"yes": fit})[0]
        else:
            yield ""
        guide = pair.finish(pair.guide)
        quick = bmr.by_free_energy(effort=1, num_samples=8, **QUIET)
        measured = self._reduce(guide, *pair.args, select=quick, **data)
        predicted = self._reduce(guide, *pair.args, **data)["yes"]
        way, result = self._attempt({"yes": measured["yes"], "not measured": predicted, **measured})
        if result is None:
            yield from (way, "", "", "")
            return
        left = result.summary()["note"].drop(list(result.masks)).map(short)
        for reason, sites in left.groupby(left, sort=False):
            self.why.append(", ".join(f"`{name}`" for name in sites.index) + f": {reason}")
        yield way
        audit = lambda: result.audit(*pair.args, num_samples=4, **data, **QUIET)  # noqa: E731
        yield self._attempt({"yes": audit})[0]
        # It fails for guides that have to be told their model and its arguments, as the page says.
        yield Trial(pair)._attempt(self._reduce(guide))[0]
        yield self._attempt(self._save_and_load(guide, result))[0]

    def _attempt(self, ways: Mapping[str, Callable[[], Any]]) -> tuple[str, Any]:
        """Return the first way that works, and what it returns."""
        for way, call in ways.items():
            try:
                return way, call()
            except Exception as error:
                reason = short(f"{error}")
                failed = "left whole" if isinstance(error, LeftWholeError) else "no"
        self.why.append(reason)
        return failed, None

    def _reduce(self, guide: Any, *args: Any, **options: Any) -> dict[str, Callable[[], Any]]:
        def reduce(**told: Any) -> bmr.Reduction:
            result = bmr.reduce(guide, *args, **told, **options)
            if not result.masks:
                raise LeftWholeError("; ".join(result.summary()["note"]))
            return result

        return {
            "yes": reduce,
            "`sites=`": lambda: reduce(sites=["w"]),
            "`model=`": lambda: reduce(model=self.pair.model),
        }

    def _save_and_load(self, guide: Any, result: bmr.Reduction) -> dict[str, Callable[[], Any]]:
        def save_and_load(**told: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "result.bmr"
                result.save(path)
                model, kwargs = result.model.model, self.pair.kwargs
                again = bmr.load(path, model, *self.pair.args, kwargs=kwargs, **told)
            assert f"{again}" == f"{result}"

        plates = self.pair.create_plates
        return {
            "yes": save_and_load,
            "`create_plates=`": lambda: save_and_load(create_plates=plates),
            "`guide=`": lambda: save_and_load(guide=guide),
        }


def short(reason: str) -> str:
    """Return the first sentence, without what all of them begin with."""
    first = re.split(r"\. (?=[A-Z])|; ", reason.partition("\n")[0])[0]
    return first.removeprefix("not reduced: ").replace("|", "\\|")


if __name__ == "__main__":
    main()
