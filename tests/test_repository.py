"""Files of the repository that other programs read."""

import re

import pytest
import yaml
from markdown import ROOT

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
YAML = sorted(
    [
        *(ROOT / ".github").rglob("*.yml"),
        ROOT / ".pre-commit-config.yaml",
        ROOT / ".readthedocs.yaml",
        ROOT / "CITATION.cff",
    ]
)


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_targets_of_make_are_there():
    files = [*YAML, *ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md")]
    for path in files:
        for line in re.findall(r"(?:run: |- |`)make ([a-z -]+)", path.read_text()):
            assert set(line.split()) <= TARGETS, f"{path.name}: make {line}"


def test_jobs_run_what_is_there():
    """Every step is an action of a stated version or a command; nothing may write by default."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert all("run" in step or "@" in step["uses"] for step in job["steps"])


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2210.09134"
    for reference in [citation, *citation["references"]]:
        assert reference["authors"] and reference["title"]
