"""Tables of what a reduction did, site by site and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from rich.table import Table

from pyro_bmr.selection.summaries import LayerSummary, SiteSummary


def draw_sites(
    sites: tuple[SiteSummary, ...], notes: Mapping[str, str], title: str, caption: str = ""
) -> Table:
    """Draw a table with one row per site; ``notes`` are its last column."""
    table = Table(title=title, title_justify="left")
    table.add_column("site")
    shrunk = ["shrunk"] if any(site.shrunk for site in sites) else []
    for column in ("shape", "total", "kept", "pruned", *shrunk, "ΔF (nats)"):
        table.add_column(column, justify="right")
    table.add_column("note")
    if caption:
        table.caption, table.caption_justify = caption, "left"
    for site in sites:
        table.add_row(
            site.name,
            " × ".join(map(str, site.shape)),
            f"{site.total:,}",
            f"{site.kept:,}",
            f"{1 - site.kept / site.total:.1%}" if site.total else "",
            *(f"{site.shrunk:,}" for _ in shrunk),
            f"{site.delta_f:+.2f}" if site.kept < site.total or site.shrunk else "",
            notes[site.name],
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
    columns = ["layer", "kind", "groups", "kept", "pruned %", "delta_f"]
    rows = [
        (x.name, x.kind, x.groups, x.kept, 100 * (1 - x.kept / x.groups), x.delta_f) for x in layers
    ]
    return pd.DataFrame(rows, columns=columns).set_index("layer")
