"""The page of a language model: a chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from shardit.server.keys import digest
from tests.support.browser import Visit, visiting
from tests.support.http_fake import Served
from tests.support.text_fake import served_texts


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_texts(tmp_path_factory.mktemp("texts") / "data") as made:
        yield made


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Visit]:
    with visiting(browser, served.url) as made:
        yield made


def say(visit: Visit, text: str, **settings: Any) -> None:
    expect(visit.page.get_by_role("button", name="Send")).to_be_visible()  # no answer is under way
    for name, value in settings.items():
        field = visit.page.locator("#chat").get_by_label(name, exact=True)
        if not field.is_visible():
            visit.page.locator("#chat .more summary").click()
        field.fill(str(value))
    visit.page.get_by_label("Message", exact=True).fill(text)
    visit.page.get_by_label("Message", exact=True).press("Enter")


def texts(visit: Visit) -> Locator:
    return visit.page.locator("#messages .text")


def test_talk_and_reload(visit: Visit) -> None:
    expect(visit.page.locator("#main")).to_be_hidden()
    say(visit, "hi")
    expect(texts(visit)).to_have_text(["hi", "<user>hi<assistant><user>hi<assistant><user>h"])
    expect(visit.page.locator(".message .line").last).to_have_text("the limit of tokens is reached")
    visit.page.reload()
    expect(texts(visit)).to_have_count(2)
    visit.page.get_by_role("button", name="New conversation").click()
    expect(texts(visit)).to_have_count(0)
    say(visit, "ho", Seed=3, **{"Tokens of an answer": 4, "System message": "be"})
    expect(texts(visit)).to_have_text(["ho", "<sys"])
    say(visit, "so")
    expect(texts(visit)).to_have_text(["ho", "<sys", "so", "<sys"])


def test_stop(visit: Visit, served: Served) -> None:
    say(visit, "slow")
    expect(texts(visit).last).to_contain_text("<user>")
    visit.page.get_by_role("button", name="Stop").click()
    expect(visit.page.locator(".message .line").last).to_have_text("stopped")
    served.until_empty()
    expect(visit.page.get_by_role("button", name="Send")).to_be_visible()


def test_errors_give_the_question_back(visit: Visit) -> None:
    say(visit, "a" * 64)
    expect(visit.page.locator("#chat-error")).to_contain_text("the model has room for 64")
    expect(visit.page.get_by_label("Message", exact=True)).to_have_value("a" * 64)
    expect(texts(visit)).to_have_count(0)
    say(visit, "fail")
    expect(visit.page.locator("#chat-error")).to_contain_text("a rank died")


def test_a_key_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    with served_texts(tmp_path / "data", api_key_hashes=(digest("alpha"),)) as served:
        with visiting(browser, served.url) as visit:
            visit.page.get_by_label("API key", exact=True).fill("alpha")
            visit.page.get_by_role("button", name="Continue").click()
            say(visit, "hi")
            expect(texts(visit).last).to_contain_text("<user>hi")
