"""Access to the page at /: keys, errors, an unreachable server, keyboard, phones, both colour schemes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from shardit.server.keys import digest
from tests.support.browser import Visit, visiting
from tests.support.http_fake import IMAGE, Served, serving

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


def test_errors_are_shown_next_to_their_field(visit: Visit) -> None:
    visit.generate("too many steps", num_inference_steps=9999)
    steps = visit.page.get_by_label("Steps")
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_have_accessible_description(re.compile("^Should be .* 200"))
    expect(steps).to_be_focused()
    visit.generate("half a pixel", num_inference_steps=2, width="1.5")
    expect(visit.page.get_by_label("Width")).to_have_accessible_description(re.compile("valid value"))
    expect(steps).not_to_have_attribute("aria-invalid", "true")
    visit.generate("", width="")
    expect(visit.page.locator("[data-field=prompt] .error")).not_to_be_empty()
    visit.generate("please fail")
    expect(visit.card("please fail")).to_contain_text("Failed: a rank died")
    expect(visit.page.locator(".compose .error:not(:empty)")).to_have_count(0)
    expect(visit.running).to_have_count(0)


def test_a_server_that_is_away_for_a_while(visit: Visit) -> None:
    expect(visit.page.locator("#state")).to_have_text("Ready")
    visit.context.set_offline(True)
    expect(visit.page.locator("#state")).to_have_text("No connection")
    visit.generate("sent into the dark")
    expect(visit.page.locator("#form-error")).to_have_text("The server cannot be reached.")
    visit.context.set_offline(False)
    expect(visit.page.locator("#state")).to_have_text("Ready")


def test_with_an_api_key(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, IMAGE, api_key_hashes=(digest("right"),)) as served, visiting(browser, served.url) as visit:
        key = visit.page.get_by_role("textbox", name="API key")
        expect(key).to_be_focused()
        expect(visit.page.locator("#main")).to_be_hidden()
        key.fill("wrong")
        key.press("Enter")
        expect(visit.page.locator("#key-error")).to_contain_text("a valid API key is needed")
        key.fill("\u043a\u043b\u044e\u0447")  # which no header can hold
        key.press("Enter")
        expect(visit.page.locator("#key-error")).to_contain_text("ASCII")
        visit.page.reload()
        key.fill("right")
        key.press("Enter")
        visit.generate("slow whisper")
        card = visit.card("slow whisper")
        expect(card).to_contain_text(re.compile(r"Step \d+ of 200"))
        card.get_by_role("button", name="Cancel").click()
        expect(card).to_have_attribute("data-status", "cancelled")
        visit.generate("a secret")
        for _ in ("made", "after a reload: the tab keeps the key"):
            assert visit.loaded("a secret") == [{"width": 64, "height": 64}]
            expect(visit.card("a secret").locator("img")).to_have_attribute("src", re.compile("^blob:"))
            visit.page.reload()
        with visit.page.expect_download() as download:
            visit.card("a secret").get_by_role("link", name="Download").click()
        assert Image.open(io.BytesIO(download.value.path().read_bytes())).format == "PNG"
        assert "right" not in " ".join(visit.requests)
        visit.page.locator("#server summary").click()
        visit.page.get_by_role("button", name="Forget the API key").click()
        expect(key).to_be_visible()
        assert visit.page.evaluate("sessionStorage.length + localStorage.length") == 0


def test_states_of_the_ranks(browser: Browser, tmp_path: Path) -> None:
    from shardit.server.messages import Ranks

    unknown = serving(tmp_path, IMAGE, state="loading", model="somebody/something")
    with unknown as served, visiting(browser, served.url) as visit:
        state = visit.page.locator("#state")
        expect(state).to_have_text("Loading the model")
        expect(visit.page.get_by_role("button", name="Generate")).to_be_disabled()  # nobody knows yet what it takes
        ranks = tuple({"rank": rank, "state": "ready", "pid": 1, "peak_bytes": 3 * 10**8} for rank in range(2))
        served.supervisor.tell(Ranks("ready", info=IMAGE, ranks=ranks))
        expect(state).to_have_text("Ready")
        expect(visit.page.get_by_role("button", name="Generate")).to_be_enabled()
        visit.page.locator("#server summary").click()
        expect(visit.page.get_by_role("row", name="1 ready 300 MB")).to_be_visible()
        served.supervisor.tell(Ranks("restarting", reason="rank 1 ended with signal 9", restarts=1))
        expect(state).to_have_text("Restarting")
        expect(visit.page.locator("#server")).to_contain_text("rank 1 ended with signal 9")
        expect(visit.page.locator("#server")).to_contain_text("1 restart")
        visit.page.keyboard.press("Escape")
        expect(visit.page.locator("#server .panel")).to_be_hidden()


def test_by_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    expect(page.locator("#state")).to_have_text("Ready")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("slow by keyboard")
    names = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.tagName")
        names.append(name)
        if name == "send":
            break
    assert names == ["image", "width", "height", "num_inference_steps", "seed", "SUMMARY", "send"]
    page.keyboard.press("Enter")
    expect(visit.card("slow by keyboard")).to_contain_text(re.compile(r"Step \d+ of 200"))
    expect(page.locator("#send")).to_be_focused()
    page.keyboard.press("Tab")  # Clear settings
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Cancel: slow by keyboard")).to_be_focused()
    page.keyboard.press("Enter")
    card = visit.card("slow by keyboard")
    expect(card).to_have_attribute("data-status", "cancelled")
    expect(card).to_be_focused()  # not lost with the button
    page.keyboard.press("Tab")
    expect(card.get_by_role("button", name="Reuse")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(card).to_have_count(0)
    assert page.evaluate("document.activeElement !== document.body")


def test_on_a_phone(browser: Browser, images: Served) -> None:
    with visiting(browser, images.url, **PHONE) as visit:
        visit.generate("slow on a phone with averyveryveryverylongwordthatcannotbebrokenanywhereelse")
        card = visit.card("slow on a phone")
        expect(card).to_contain_text(re.compile(r"Step \d+ of 200"))
        expect(card.get_by_role("button", name="Cancel")).to_be_in_viewport()
        card.get_by_role("button", name="Cancel").tap()
        expect(card).to_have_attribute("data-status", "cancelled")
        visit.generate("made on a phone", num_inference_steps=2)
        visit.loaded("made on a phone")
        visit.page.locator("#server summary").tap()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
        for button in visit.page.locator("button:visible, a.plain:visible").all():
            box = button.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) >= 44, button.inner_html()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Browser, images: Served, scheme: str) -> None:
    with visiting(browser, images.url, color_scheme=scheme) as visit:
        visit.generate("please fail in colour")
        expect(visit.card("please fail in colour").first).to_contain_text("Failed")
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
        assert visit.page.evaluate(_FAINT) == []


# Texts whose contrast to what is behind them is below 4.5.
_FAINT = """() => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => {
        const [r, g, b] = parts(colour).map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (parts(colour)[3] !== 0) return colour;
        }
    };
    const faint = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
        const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
        if (a / b < 4.5) faint.push(`${texts.currentNode.data.trim()}: ${(a / b).toFixed(2)}`);
    }
    return faint;
}"""
