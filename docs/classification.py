"""The figure of docs/guide/classification.md, drawn by the code of the page itself."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from markdown import run_blocks  # noqa: E402

os.chdir(DOCS / "images")
run_blocks(DOCS / "guide" / "classification.md")
