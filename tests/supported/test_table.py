"""The page of what is supported shows what happens."""

import pytest
from often import often
from table import PAGE, TABLES, find_between, render


@pytest.mark.parametrize("name", often(TABLES, "guide"))
def test_the_page_shows_what_happens(name):
    shown = find_between(PAGE.read_text(), name)[0]
    assert render(name) == shown, "python tests/supported/table.py writes the page"
