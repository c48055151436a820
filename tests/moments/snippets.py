"""The blocks of the page on posteriors from elsewhere that need libraries beside the package."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "posteriors-from-elsewhere.md"


def run_snippet(library):
    """Run the first block of the page, which makes data, and that of a library; return names."""
    blocks = re.findall(r"^```(python|py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (own,) = (block for kind, block in blocks if kind == "py" and f"{library}" in block)
    namespace = {}
    for block in (blocks[0][1], own):
        exec(compile(block, PAGE.name, "exec"), namespace)
    return namespace
