"""The documentation: its code runs and prints what it shows, links lead somewhere, nothing is left out."""

import re

import pytest
from markdown import ROOT, anchors, links, run_blocks

import pyro_bmr
from pyro_bmr import testing

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks, _ = run_blocks(page)
    assert blocks


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name
)
def test_links_within_the_repository(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_reference_names_everything_public():
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = re.findall(
        r"^\.\. (?:autofunction|autoclass|data):: (\w+)$", reference, re.MULTILINE
    )
    assert sorted(documented) == sorted(pyro_bmr.__all__)
    index = (DOCS / "api" / "index.md").read_text()
    listed = re.findall(r"^(?:   |\| {py:data}`~pyro_bmr\.)(\w+)(?:$|`)", index, re.MULTILINE)
    assert sorted(listed) == sorted(pyro_bmr.__all__)
    assert f"automodule:: {testing.__name__}" in reference
