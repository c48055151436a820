"""The documentation: its code runs, its links lead somewhere, and nothing public is left out."""

import re

import pytest
from markdown import ROOT, anchors, check_same, links, run_blocks

import pyro_bmr
from pyro_bmr import testing

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
AROUND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    _, outputs = run_blocks(page)
    for printed, shown in outputs:
        if shown is not None:
            check_same(printed, shown)


@pytest.mark.parametrize("page", [*PAGES, *AROUND], ids=name)
def test_links_within_the_repository(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_reference_names_everything_public():
    pages = {page.stem: page.read_text() for page in (DOCS / "api").glob("*.md")}
    listed = r"^(?:   |\| {py:data}`~pyro_bmr\.)(\w+)(?:$|`)"
    assert sorted(re.findall(listed, pages.pop("index"), re.MULTILINE)) == sorted(pyro_bmr.__all__)
    entry = r"^\.\. (?:autofunction|autoclass|data):: (\w+)$"
    entries = re.findall(entry, "\n".join(pages.values()), re.MULTILINE)
    assert sorted(entries) == sorted(pyro_bmr.__all__)
    assert f"automodule:: {testing.__name__}" in pages["extending"]
