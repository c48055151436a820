"""How much of each site is left, as a small picture for notebooks."""

from __future__ import annotations

from html import escape

from pyro_bmr.selection.summaries import SiteSummary, fold_alike

_WIDTH = 240  # pixels
_MOST = 24  # rows
_BLUE = "#0072B2"  # told from what is under it on light and dark pages
_GREY = "#80808040"


def draw_kept(sites: tuple[SiteSummary, ...]) -> str:
    """Draw a bar for each site, filled by what is kept.

    Of tables and boxes, since notebooks that are not trusted, and sites that show them, leave out
    SVG, and run its texts together.
    """
    rows = [site for site in fold_alike(sites) if site.total]
    lines = [_draw_row(site) for site in rows[:_MOST]]
    if rows[_MOST:]:
        lines.append(f"<tr><td></td><td>and {len(rows) - _MOST} more</td><td></td></tr>")
    return f'<table title="what is kept of each site"><tbody>{"".join(lines)}</tbody></table>'


def _draw_row(site: SiteSummary) -> str:
    name = site.name if len(site.name) <= 22 else f"…{site.name[-21:]}"
    kept = _box(_WIDTH * site.kept / site.total, _BLUE, "")
    return (
        f"<tr><td>{escape(name)}</td><td>{_box(_WIDTH, _GREY, kept)}</td>"
        f'<td style="text-align:left;white-space:nowrap">{site.kept:,} of {site.total:,}</td></tr>'
    )


def _box(width: float, colour: str, inside: str) -> str:
    return f'<div style="width:{width:.0f}px;height:12px;background-color:{colour}">{inside}</div>'
