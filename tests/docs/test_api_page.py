"""docs/api.md equals the page generated from the docstrings."""

from __future__ import annotations

import re

import shardit
from tests.support.api_page import PAGE, page

BARE = re.compile(r"^\* `\w+: [^`]+`$", re.M)
"""A field without a text."""


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `make api`"


def test_every_public_field_has_its_text() -> None:
    assert BARE.findall("* `a: int = 1`\n* `b: int`: A number.") == ["* `a: int = 1`"]
    assert not BARE.findall(page())


def test_every_public_name_has_its_text() -> None:
    text = page()
    for name in shardit.__all__:
        assert name.startswith("__") or f"### `{name}`\n" in text
    assert "None\n" not in {line for line in text.splitlines(keepends=True) if line.startswith("None")}
