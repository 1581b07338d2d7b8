"""The page of a model whose weights are trained: it opens with a prompt that the model understands."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser, expect

from shardit.models import tiny
from tests.support.browser import real_server, visiting


def test_the_example_makes_a_video(browser: Browser, tmp_path: Path) -> None:
    example = tiny.example_prompt("shapes")
    with real_server("tiny/shapes", tmp_path) as url, visiting(browser, url) as visit:
        prompt = visit.page.get_by_label("Prompt", exact=True)
        expect(prompt).to_have_value(example)
        visit.page.get_by_role("button", name="Generate").click()
        assert visit.loaded(example) == [{"width": 64, "height": 64}]
        prompt.fill("a red circle")
        visit.page.reload()
        expect(prompt).to_have_value(example)
