"""The way of a request from the command line to a block call is short, and README shows it."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT
from tests.support.walk import Way, lines, walk

FILES = 12
LINES = 1800
"""What the way may take; a number is raised on purpose, or not at all."""

ROW = re.compile(r"^\| `([\w/]+\.py)` \| (`[^|]+`) \|", re.M)
"""A row of the table in README: file, functions."""


@pytest.fixture(scope="module")
def way() -> Way:
    return walk()


def test_request_path_is_short(way: Way) -> None:
    assert len(way) <= FILES, "\n".join(way)
    assert sum(map(lines, way)) <= LINES, {file: lines(file) for file in way}


def test_readme_shows_the_request_path(way: Way) -> None:
    part = (ROOT / "README.md").read_text("utf-8").partition("The path of a request")[2].partition("\n## ")[0]
    shown = {file: re.findall(r"`([^`]+)`", functions) for file, functions in ROW.findall(part)}
    assert shown == way
