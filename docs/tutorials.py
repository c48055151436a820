"""Draw the figures of the tutorials, by the code of these pages: ``python docs/tutorials.py``."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from figures import save_small  # noqa: E402
from markdown import run_blocks  # noqa: E402
from PIL import Image  # noqa: E402

os.chdir(DOCS / "images")
for page in ("classification", "hierarchical", "scikit-learn"):
    run_blocks(DOCS / "guide" / f"{page}.md")
    picture = Path(f"{page}.png")
    save_small(Image.open(picture), picture)
