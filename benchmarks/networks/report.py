"""Draw the figures of the page on networks, and fill in its tables and the README's, from files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import tables
from figures import FIGURES
from PIL import Image
from tables import Sources, read_sources

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "networks.md")
TABLES: Mapping[str, Callable[[Sources, str], str]] = {
    "claim": tables.claim,
    "methods": tables.methods_table,
    "published": tables.published_table,
    "equal compression": tables.equal_compression_table,
    "attempts": tables.attempts_table,
    "rounds": tables.rounds_table,
}


def main() -> None:
    """Write the pages and the pictures."""
    sources = read_sources(HERE)
    for name, draw in FIGURES.items():
        figure = draw(sources)
        path = ROOT / "docs" / "images" / f"networks-{name}.png"
        figure.savefig(path, dpi=90)
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            path, optimize=True
        )
        plt.close(figure)
    for page in PAGES:
        page.write_text(filled(page.read_text(), sources))


def filled(page: str, sources: Sources) -> str:
    """Put each table between the two comments that name it and its network.

    Returns
    -------
    str
        The page.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]](sources, match[3])}\n\n{match[4]}"

    pattern = r"(<!-- networks: ([\w ]+), ([\w-]+) -->).*?(<!-- end -->)"
    return re.sub(pattern, fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    main()
