"""docs/api.md equals the page generated from the docstrings."""

from __future__ import annotations

import shardit
from tests.support.api_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `make api`"


def test_public_names_say_what_they_are() -> None:
    text = page()
    for name in shardit.__all__:
        assert name.startswith("__") or f"### `{name}`\n" in text
    assert "None\n" not in {line for line in text.splitlines(keepends=True) if line.startswith("None")}
