"""Pages of Markdown with code: what their blocks print, and where their links lead."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def run_blocks(page):
    """Run the blocks of Python in one namespace; return it, and what they printed and should."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    namespace, outputs = {}, []
    for language, block in blocks:
        if language == "python":
            with redirect_stdout(StringIO()) as output:
                exec(compile(block, page.name, "exec"), namespace)
            outputs.append((output.getvalue(), None))
        elif language == "text":
            outputs[-1] = outputs[-1][0], block
    return namespace, outputs


def check_same(printed, shown):
    """Words and integers are the same, other numbers nearly: machines differ in last digits."""
    assert words(printed) == words(shown), f"printed\n{printed}\nbut the page shows\n{shown}"
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        if "." in one:
            assert float(one) == pytest.approx(float(other), rel=0.02, abs=0.1)
        else:
            assert one == other


def words(text):
    return re.findall(r"[^\W\d_]+", NUMBER.sub(" ", text))


def links(page):
    """Return the links of a page to other files, and to headings, relative to the page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not link.startswith("http")]


def anchors(page):
    """Return the names that a browser of the repository gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }
