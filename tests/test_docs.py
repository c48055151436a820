"""The documentation: its code runs, its links lead somewhere, and nothing public is left out."""

import re

import pytest
from markdown import ROOT, anchors, check_same, links, run_blocks

import pyro_bmr
from pyro_bmr import testing

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SLOW = ("audit", "many-runs", "mixed-guides", "own-model", "priors", "rounds", "scikit-learn")
SLOW += ("variable-selection",)
AROUND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name(page):
    return str(page.relative_to(ROOT))


WITH_CODE = [
    pytest.param(page, id=name(page), marks=[pytest.mark.rare] * (page.stem in SLOW))
    for page in PAGES
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", WITH_CODE)
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


# What is reached by a longer path.
ELSEWHERE = {
    *(f"baselines.{name}" for name in ("snr", "spr", "magnitude", "random")),
    *(f"extend.{name}" for name in pyro_bmr.extend.__all__ if name not in pyro_bmr.__all__),
    *(f"types.{name}" for name in pyro_bmr.types.__all__),
    *("plots.data", "plots.plot_presence", "plots.plot_sites"),
    *("sklearn.PrunedClassifier", "sklearn.PrunedRegressor"),
    *("load", "nn.fan_in_normal", "nn.learned_normal", "nn.normal"),
}
HELD = {"AveragedGuide", "Check", "Cost", "LayerSummary", "Round", "SiteSummary", "Sparsity"}
HELD |= {"Epoch", "Probability", "UnitGrouping", "Window"}


def test_the_reference_names_everything_public():
    pages = {page.stem: page.read_text() for page in (DOCS / "api").glob("*.md")}
    listed = r"^(?:   ~?|\| {py:data}`~pyro_bmr\.)([\w.]+)(?:$|`)"
    index = re.findall(listed, pages.pop("index"), re.MULTILINE)
    entry = r"^\.\. (?:autofunction|autoclass|data):: ([\w.]+)$"
    entries = re.findall(entry, "\n".join(pages.values()), re.MULTILINE)
    for names in (index, entries):
        short = {name.removeprefix("pyro_bmr.") for name in names}
        assert len(names) == len(short)
        held = {name for name in short if name.rpartition(".")[2] in HELD}
        assert short - held == {*pyro_bmr.__all__, *ELSEWHERE}
    assert len(held) == len(HELD)
    assert f"automodule:: {testing.__name__}" in pages["extending"]


def test_every_figure_has_a_picture():
    """In the gallery and in the reference; none is large."""
    gallery = (DOCS / "guide" / "figures.md").read_text()
    entries = (DOCS / "api" / "figures.md").read_text().split(".. auto")
    for name in {*pyro_bmr.plots.__all__} - {"data"}:
        path = name if name in pyro_bmr.__all__ else f"plots.{name}"
        assert f"`bmr.{path}(" in gallery
        (entry,) = (one for one in entries if re.match(rf"function:: (?:[\w.]+\.)?{name}\n", one))
        assert ".. image:: " in entry
    large = [path.name for path in DOCS.glob("images/*.png") if path.stat().st_size > 150_000]
    assert not large
