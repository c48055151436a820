"""How much of each site is left, as a small picture for notebooks."""

from __future__ import annotations

from html import escape

from pyro_bmr.selection.summaries import SiteSummary, fold_alike

_ROW, _NAME, _BAR, _COUNT = 18, 150, 240, 150  # pixels
_MOST = 24  # rows
_BLUE = "#0072B2"  # told from what is under it on light and dark pages


def draw_kept(sites: tuple[SiteSummary, ...]) -> str:
    """Draw a bar for each site as SVG, filled by what is kept, in the colour of the text around."""
    rows = [site for site in fold_alike(sites) if site.total]
    shown = rows[:_MOST]
    lines = [line for place, site in enumerate(shown) for line in _draw_row(place * _ROW, site)]
    if rows[_MOST:]:
        more = f"and {len(rows) - _MOST} more"
        lines.append(f'<text x="{_NAME}" y="{len(shown) * _ROW + 13}">{more}</text>')
    height = (len(shown) + bool(rows[_MOST:])) * _ROW
    width = _NAME + _BAR + _COUNT
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'style="max-width:100%" font-size="12" font-family="sans-serif" fill="currentColor">'
        f"<title>what is kept of each site</title>{''.join(lines)}</svg>"
    )


def _draw_row(top: int, site: SiteSummary) -> tuple[str, ...]:
    kept = _BAR * site.kept / site.total
    name = site.name if len(site.name) <= 22 else f"…{site.name[-21:]}"
    return (
        f'<text x="{_NAME - 8}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{_NAME}" y="{top + 3}" width="{_BAR}" height="12" fill-opacity="0.12"/>',
        f'<rect x="{_NAME}" y="{top + 3}" width="{kept:.1f}" height="12" fill="{_BLUE}"/>',
        f'<text x="{_NAME + _BAR + 8}" y="{top + 13}">{site.kept:,} of {site.total:,}</text>',
    )
