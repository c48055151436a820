"""What is shown of a result: in a notebook, and in a narrow terminal."""

from html.parser import HTMLParser
from io import StringIO

import pyro
import pyro.distributions as dist
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from pyro.infer.autoguide import AutoNormal
from rich.console import Console
from traitlets.config import Config

import pyro_bmr as bmr
from pyro_bmr import display
from pyro_bmr.selection.pictures import draw_kept
from pyro_bmr.selection.summaries import SiteSummary


@pytest.fixture(name="result", scope="module")
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
    assert "svg" not in shown.seen and shown.seen.count("details") == 2
    assert html.count("<details open>") == 1
    assert {"sites", "what came true", "w<1>", "1 of 4"} <= set(shown.text)
    assert "NaN" not in html and "None" not in html
    assert '<td style="text-align:left">not reduced' in html and "\x02" not in html
    assert '<th style="text-align:left">note</th>' in html


def test_the_picture_shows_what_is_kept():
    html = draw_kept((SiteSummary("a", (10,), kept=5, delta_f=-1.0), SiteSummary("b", (), 1, 0.0)))
    assert html.count("width:240px") == 3 and html.count("width:120px") == 1
    many = tuple(SiteSummary(f"layer{i}", (2,), 1, -1.0) for i in range(40))
    assert "and 16 more" in draw_kept(many) and Tags(draw_kept(many)).seen.count("div") == 48


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


@pytest.fixture(name="cell")
def fixture_cell(monkeypatch):
    """What a cell's display shows, one entry an update."""
    shown = []

    class Place:
        def update(self, data, raw):
            assert raw
            shown.append(data)

    def show(data, raw, display_id):
        assert raw and display_id
        shown.append(data)
        return Place()

    monkeypatch.setattr("IPython.display.display", show)
    monkeypatch.setattr(
        display, "get_console", lambda: Console(force_jupyter=True, file=StringIO())
    )
    monkeypatch.setattr(display, "_REFRESH", 0.0)
    return shown


def test_a_bar_in_a_cell_needs_no_widgets_and_leaves_nothing(cell):
    with display.progress_bar("epochs") as bar:
        task = bar.add_task("compiling", total=4, note="")
        bar.update(task, description="training", advance=1, note="F < 3.0")
        bar.advance(task)
    first, compiling, training, _, last = cell
    assert first == last == {"text/html": "", "text/plain": ""}
    assert Tags(compiling["text/html"]).seen == Tags(training["text/html"]).seen
    assert "compiling 0/4 epochs" in compiling["text/plain"]
    assert "training 1/4 epochs  F < 3.0" in training["text/plain"]
    assert '<progress max="4" value="1.0">' in training["text/html"].replace('"1"', '"1.0"')
    assert "F &lt; 3.0" in training["text/html"]


def test_a_bar_that_nobody_wants_shows_nothing_in_a_cell(cell):
    with display.progress_bar("epochs", wanted=False) as bar:
        bar.advance(bar.add_task("training", total=4, note=""))
    assert not cell


def test_a_fit_in_a_cell_shows_how_far_it_is(cell):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=torch.ones(()))

    bmr.fit(model, AutoNormal(model), num_epochs=5, compile=False)
    assert any("5/5 epochs  F = " in data["text/plain"] for data in cell)
    assert cell[-1]["text/html"] == ""


def test_completion_offers_what_is_public():
    beside = {*dir(bmr)} - {*bmr.__all__}
    modules = {"baselines", "datasets", "extend", "nn", "plots", "sklearn", "testing", "types"}
    assert beside == modules | {"__version__", "load"}
    assert all(hasattr(bmr, name) for name in dir(bmr))
    assert dir(bmr.baselines) == ["magnitude", "random", "snr", "spr"]
    assert "load_mnist" in dir(bmr.datasets) and "gzip" not in dir(bmr.datasets)
    assert dir(bmr.testing) == ["check_guide_family"]


def tell(code):
    """What IPython says of the error of a cell."""
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}), user_ns={"bmr": bmr})
    error = shell.run_cell(code).error_in_exec
    return "\n".join(
        shell.InteractiveTB.structured_traceback(type(error), error, error.__traceback__)
    )


BROKEN = """
import torch, pyro, pyro.distributions as dist
def model(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=torch.ones(5))
bmr.fit(model, bmr.mean_field(model), torch.ones(5, 2), num_epochs=2)
"""


def test_errors_in_a_notebook_are_short_and_show_the_users_lines():
    wrong = tell("bmr.reduce(3)")
    assert len(wrong.splitlines()) <= 20 and "skipping hidden" in wrong
    assert "Expected" in wrong.splitlines()[-1]
    broken = tell(BROKEN)
    assert len(broken.splitlines()) <= 60 and "x @ w" in broken
