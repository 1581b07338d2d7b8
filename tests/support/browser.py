"""A headless Chromium for the tests of the page, and frequent actions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect, sync_playwright

from tests.support.http_fake import WAIT_S

WAIT_MS = WAIT_S * 1000
expect.set_options(timeout=WAIT_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. Without it the tests are skipped, but they fail where CI is set to true."""
    path = shutil.which("chromium")
    if path is None:
        reason = "there is no chromium on the PATH; install it: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        # The sandbox cannot be had by root, and all that is opened is ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """The page of a server in a tab of its own, its requests and its errors."""

    def __init__(self, browser: Browser, url: str, **options: Any):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(url)

    @property
    def running(self) -> Locator:
        """Cards of jobs that have not ended."""
        return self.page.locator("#running > li")

    @property
    def gallery(self) -> Locator:
        """Cards of jobs that have."""
        return self.page.locator("#gallery > li")

    def card(self, prompt: str) -> Locator:
        """The card of the job with that prompt."""
        return self.page.locator(".results li").filter(has_text=prompt)

    def generate(self, prompt: str, **fields: object) -> None:
        """Fill in the form by the names of its fields, and send it."""
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        for name, value in fields.items():
            field = self.page.locator(f"#{name}")
            if not field.is_visible():
                self.page.locator("#more summary").click()
            field.fill(str(value))
        self.page.get_by_role("button", name="Generate").click()

    def loaded(self, prompt: str, count: int = 1) -> list[dict[str, Any]]:
        """Width and height of the pictures and videos of a finished job, which the browser has really decoded."""
        media = self.card(prompt).locator("img, video")
        expect(media).to_have_count(count)
        return [media.nth(index).evaluate(_SIZE) for index in range(count)]


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """Open the page at `url`; at the end, whatever else was tested: nothing came from elsewhere, no script failed, and
    nothing was against the page's policy."""
    visit = Visit(browser, url, **options)
    try:
        yield visit
        outside = [asked for asked in visit.requests if not asked.startswith((url, "blob:", "data:"))]
        assert outside == []
        # What the server refuses is told to the console by the browser itself.
        assert [text for text in visit.complaints if not text.startswith("Failed to load resource")] == []
    finally:
        visit.context.close()


@contextmanager
def real_server(model: str, folder: Path) -> Iterator[str]:
    """The address of `shardit serve` with its data in `folder`, as a user starts it."""
    command = [sys.executable, "-m", "shardit", "serve", model, "--port", "0", "--data-dir", str(folder / "data")]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 2 * WAIT_S
        while (found := re.search(r"http://127.0.0.1:[0-9]+", (folder / "server.log").read_text())) is None:
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < until, (folder / "server.log").read_text()
            time.sleep(0.05)
        yield found[0]
    finally:
        process.terminate()
        try:
            assert process.wait(WAIT_S) == 0, (folder / "server.log").read_text()
        finally:
            process.kill()


_SIZE = """async (media) => {
    const event = media.tagName === "IMG" ? "load" : "loadeddata";
    const ready = () => (media.tagName === "IMG" ? media.complete && media.naturalWidth : media.readyState >= 2);
    if (!ready()) {
        await new Promise((resolve, reject) => {
            media.addEventListener(event, resolve);
            media.addEventListener("error", () => reject(new Error("it cannot be shown")));
        });
    }
    return { width: media.naturalWidth ?? media.videoWidth, height: media.naturalHeight ?? media.videoHeight };
}"""
