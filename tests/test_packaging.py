"""What the Makefile installs, and what the build makes of the version and of the README."""

import re
import shutil
import subprocess
import tomllib

import pytest
from markdown import ROOT

import pyro_bmr as bmr

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(*arguments):
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "lint", "docs", "dist"])
def test_nothing_is_installed_into_an_environment_that_is_named(target, tmp_path):
    assert "pip install" not in make(target, f"VENV={tmp_path}")
    assert "pip install" in make("install", f"VENV={tmp_path}")
    assert "pip install" in make("-W", "pyproject.toml", target, "VENV=.venv")


@needs_make
def test_an_environment_without_the_package_is_told_how_to_get_it(tmp_path):
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode and f"`make install VENV={tmp_path}` installs it" in done.stdout


def test_the_lowest_versions_are_those_that_are_tested():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    extras = PROJECT["project"]["optional-dependencies"]
    own = (PROJECT["project"]["dependencies"], *map(extras.get, ("export", "plots", "sklearn")))
    for package, lowest in (one.split(">=") for part in own for one in part):
        assert _release(tested[package]) == _release(lowest), package


def test_the_readme_of_the_index_has_absolute_links():
    text = (ROOT / "README.md").read_text()
    rules = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    for rule in rules:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    text = text.replace("$HFPR_VERSION", bmr.__version__)
    links = re.findall(r"\]\(([^)]+)\)", text)
    base = PROJECT["project"]["urls"]["Source"]
    assert all(link.startswith("https://") for link in links)
    assert f"{base}/blob/v{bmr.__version__}/CHANGELOG.md" in links
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    raw = base.replace("github.com", "raw.githubusercontent.com") + f"/v{bmr.__version__}/"
    assert pictures and all((ROOT / picture.removeprefix(raw)).is_file() for picture in pictures)


def _release(version):
    parts = [int(part) for part in version.split(".")]
    return parts + [0] * (3 - len(parts))
