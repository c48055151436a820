"""Draw the figures of the tutorials, by the code of these pages: ``python docs/tutorials.py``."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from markdown import run_blocks  # noqa: E402

os.chdir(DOCS / "images")
for page in ("classification", "hierarchical"):
    run_blocks(DOCS / "guide" / f"{page}.md")
