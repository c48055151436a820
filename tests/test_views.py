"""What is shown of a result: in a notebook, and in a narrow terminal."""

from html.parser import HTMLParser
from io import StringIO

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from rich.console import Console

import pyro_bmr as bmr
from pyro_bmr.selection.pictures import draw_kept
from pyro_bmr.selection.summaries import SiteSummary


@pytest.fixture(name="result")
def fixture_result():
    x = torch.randn(60, 4)
    y = 2 * x[:, 0] + 0.1 * torch.randn(60)

    def model(x, y=None):
        w = pyro.sample("w<1>", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, noise), obs=y)

    guide = AutoNormal(model)
    bmr.fit(model, guide, x, y, num_epochs=300, lr=0.02, compile=False)
    return bmr.reduce(guide, x, y)


class Tags(HTMLParser):
    """Reads tags, and fails where they do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_notebook_shows_folds_and_a_picture(result):
    html = result._repr_html_()
    shown = Tags(html)
    assert shown.seen.count("svg") == 1 and shown.seen.count("details") == 2
    assert html.count("<details open>") == 1
    assert {"sites", "what came true", "w<1>", "1 of 4"} <= set(shown.text)
    assert "NaN" not in html and "None" not in html


def test_the_picture_shows_what_is_kept():
    html = draw_kept((SiteSummary("a", (10,), kept=5, delta_f=-1.0), SiteSummary("b", (), 1, 0.0)))
    full, half = 'width="240.0"', 'width="120.0"'
    assert html.count(full) == 1 and html.count(half) == 1
    many = tuple(SiteSummary(f"layer{i}", (2,), 1, -1.0) for i in range(40))
    assert "and 16 more" in draw_kept(many) and Tags(draw_kept(many)).seen.count("rect") == 48


@pytest.mark.parametrize("width", [80, 100])
def test_notes_are_read_whole(result, width):
    """In 80 columns they stand below the table; nothing is cut off."""
    text = StringIO()
    Console(file=text, width=width).print(result)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= width and "…" not in text.getvalue()
    assert any(line.startswith("noise: not reduced") for line in lines) == (width == 80)


def test_a_printed_result_fits_the_terminal(result, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(result).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, str(result).splitlines())) <= 100
