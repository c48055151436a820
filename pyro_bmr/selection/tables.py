"""Tables of what a reduction did: by site, by layer, by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from pyro_bmr.selection.summaries import LayerSummary, Round, SiteSummary, fold_alike

if TYPE_CHECKING:
    import pandas as pd

_WIDE = 100  # columns, where notes have a column of their own


@dataclass(frozen=True)
class SitesTable:
    """A table of sites, alike ones in one row; what is said of each stands beside or below it."""

    sites: tuple[SiteSummary, ...]
    undecided: Mapping[str, int]  # by name, how many elements
    title: str
    caption: str

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it; notes go below where beside they would have too narrow a column."""
        sites = fold_alike(self.sites)
        notes = {site.name: _note(site, self.undecided) for site in sites}
        beside = options.max_width >= _WIDE
        table = _draw_sites(sites, notes if beside else {})
        table.title, table.title_justify = self.title, "left"
        lines = [] if beside else [f"{name}: {note}" for name, note in notes.items() if note]
        table.caption, table.caption_justify = "\n".join([*lines, self.caption]).strip(), "left"
        yield table


def _draw_sites(sites: Sequence[SiteSummary], notes: Mapping[str, str]) -> Table:
    table = Table()
    table.add_column("site", no_wrap=True)
    shrunk = ["shrunk"] if any(site.shrunk for site in sites) else []
    measured = any(site.realised is not None for site in sites)
    nats = ["ΔF (nats)", "realised"] if measured else ["ΔF (nats)"]
    for column in ("shape", "total", "kept", "pruned", *shrunk, *nats):
        table.add_column(column, justify="right")
    if notes:
        table.add_column("note")
    for site in sites:
        table.add_row(
            site.name,
            " × ".join(map(str, site.shape)),
            f"{site.total:,}" if site.held else "",
            f"{site.kept:,}" if site.held else "",
            f"{1 - site.kept / site.total:.1%}" if site.total else "",
            *(f"{site.shrunk:,}" for _ in shrunk),
            *(_nats(x, site) for x in (site.delta_f, site.realised)[: len(nats)]),
            *([notes[site.name]] if notes else []),
        )
    return table


def draw_layers(layers: tuple[LayerSummary, ...]) -> Table:
    """Draw a table with one row per layer of groups."""
    table = Table("layer", "kind")
    for column in ("groups", "kept", "pruned", "ΔF (nats)"):
        table.add_column(column, justify="right")
    for layer in layers:
        table.add_row(
            layer.name,
            layer.kind,
            f"{layer.groups:,}",
            f"{layer.kept:,}",
            f"{1 - layer.kept / layer.groups:.1%}",
            f"{layer.delta_f:+.2f}" if layer.kept < layer.groups else "",
        )
    return table


def frame_layers(layers: tuple[LayerSummary, ...]) -> pd.DataFrame:
    """Make a data frame with one row per layer of groups."""
    import pandas as pd

    columns = ["layer", "kind", "groups", "kept", "pruned %", "delta_f"]
    rows = [
        (x.name, x.kind, x.groups, x.kept, 100 * (1 - x.kept / x.groups), x.delta_f) for x in layers
    ]
    return pd.DataFrame(rows, columns=columns).set_index("layer")


def draw_rounds(rounds: tuple[Round, ...]) -> Table:
    """Draw a table with one row per round."""
    kept = next(r for r in rounds if r.kept)
    title = (
        f"F = {kept.free_energy:.1f} ± {kept.free_energy_error:.1f} nats after round {kept.index}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("round", "pruned", "ΔF predicted", "ΔF realised", "F after training"):
        table.add_column(column, justify="right")
    for r in rounds:
        table.add_row(
            f"{r.index}{' (kept)' if r.kept else '' if r.counts else ' (refused)'}",
            f"{r.sparsity:.1%}",
            f"{r.predicted:+.1f}" if r.index else "",
            f"{r.realised:+.1f} ± {r.realised_error:.1f}" if r.index else "",
            f"{r.free_energy:.1f} ± {r.free_energy_error:.1f}",
        )
    return table


def frame_sites(sites: tuple[SiteSummary, ...], undecided: Mapping[str, int]) -> pd.DataFrame:
    """Make a data frame with one row per site."""
    import pandas as pd

    shrunk = any(site.shrunk for site in sites)
    measured = any(site.realised is not None for site in sites)
    rows = [
        {
            "site": site.name,
            "shape": site.shape,
            "total": site.total,
            "kept": site.kept,
            "pruned %": 100 * (1 - site.kept / site.total) if site.total else 0.0,
            **({"shrunk": site.shrunk} if shrunk else {}),
            "delta_f": site.delta_f,
            **({"realised": site.realised} if measured else {}),
            "undecided": undecided.get(site.name, 0),
            "wide": site.wide,
            "unscored": site.unscored,
            "note": _note(site, undecided),
        }
        for site in sites
    ]
    return pd.DataFrame(rows).set_index("site")


def frame_realised(sites: tuple[SiteSummary, ...]) -> pd.DataFrame:
    """Make a data frame of ΔF predicted and realised, with one row per site that lost elements."""
    import pandas as pd

    rows = [
        (site.name, site.delta_f, site.realised)
        for site in fold_alike(sites)
        if site.kept < site.total or site.shrunk
    ]
    frame = pd.DataFrame(rows, columns=["site", "delta_f", "realised"]).set_index("site")
    frame.loc["total"] = frame.sum()
    return frame.assign(difference=frame["realised"] - frame["delta_f"])


def frame_rounds(rounds: tuple[Round, ...]) -> pd.DataFrame:
    """Make a data frame with one row per round."""
    import pandas as pd

    columns = [field.name for field in fields(Round)]
    return pd.DataFrame([asdict(r) for r in rounds], columns=columns).set_index("index")


def _nats(value: float | None, site: SiteSummary) -> str:
    changed = site.kept < site.total or site.shrunk
    return f"{value:+.2f}" if changed and value is not None else ""


def _note(site: SiteSummary, undecided: Mapping[str, int]) -> str:
    count = undecided.get(site.name, 0)
    return "; ".join(note for note in (site.note, f"{count:,} undecided" if count else "") if note)
