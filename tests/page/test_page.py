"""The page at / in a real browser: make, watch, cancel, see, keep, delete; a real server."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Route, expect

from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from tests.support.browser import Visit, real_server, visiting
from tests.support.http_calls import LATER
from tests.support.http_fake import Served, picture, serving


def test_make_see_download_reload_delete(visit: Visit, images: Served) -> None:
    visit.generate("a quiet harbour", width=48, height=32, num_inference_steps=2, seed=2**62 + 1)
    assert visit.loaded("a quiet harbour") == [{"width": 48, "height": 32}]
    card = visit.card("a quiet harbour")
    # A seed of more digits than JavaScript's numbers hold is sent and shown as it is.
    expect(card).to_contain_text(f"48 × 32 · 2 steps · seed {2**62 + 1}")
    with visit.page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    with Image.open(download.value.path()) as made:
        assert (made.format, made.size) == ("PNG", (48, 32))
    visit.page.reload()
    assert visit.loaded("a quiet harbour") == [{"width": 48, "height": 32}]
    job_id = card.get_attribute("data-job")
    card.get_by_role("button", name="Delete").click()
    expect(card).to_be_visible()
    card.get_by_role("button", name="Delete?").click()
    expect(card).to_have_count(0)
    assert images.call("GET", f"/v1/images/{job_id}")[0] == 404


def test_each_edited_form_is_sent_and_a_double_click_sends_once(visit: Visit, images: Served) -> None:
    held: list[Route] = []
    visit.page.route("**/v1/images/generations", lambda route: held.append(route))
    visit.generate("answered late")
    visit.page.get_by_role("button", name="Generate").click()  # nothing was typed since
    visit.generate("typed meanwhile")
    expect(visit.page.locator("#send")).to_have_attribute("aria-busy", "true")
    visit.page.wait_for_function("() => true")  # lets the routes arrive
    prompts = [json.loads(route.request.post_data or "")["prompt"] for route in held]
    assert prompts == ["answered late", "typed meanwhile"]
    for route in reversed(held):
        route.continue_()
    for prompt in prompts:
        visit.loaded(prompt)
        expect(visit.card(prompt)).to_have_count(1)
    expect(visit.page.locator("#send")).not_to_have_attribute("aria-busy", "true")


def test_watch_and_cancel(visit: Visit, images: Served) -> None:
    visit.generate("slow first")
    visit.generate("slow second")
    first, second = visit.card("slow first"), visit.card("slow second")
    expect(first).to_contain_text(re.compile(r"Step \d+ of 200 · 0.05 s per step · about .* left"))
    expect(second).to_contain_text("In the queue, next")
    expect(visit.page.locator("#state")).to_have_text("Ready · 1 running · 1 waiting")
    share = first.locator("progress").evaluate("bar => bar.value")
    assert 0 < share < 1
    visit.page.reload()  # jobs go on without the page, and it finds them again
    expect(first).to_contain_text(re.compile(r"Step \d+ of 200"))
    assert first.locator("progress").evaluate("bar => bar.value") > share
    second.get_by_role("button", name="Cancel").click()
    expect(second).to_have_attribute("data-status", "cancelled")
    expect(first).to_contain_text(re.compile(r"Step \d+ of 200"))
    first.get_by_role("button", name="Cancel").click()
    expect(first).to_have_attribute("data-status", "cancelled")
    expect(visit.page.locator("#announce")).to_have_text("Cancelled: slow first")
    expect(visit.running).to_have_count(0)
    for card in (first, second):
        assert images.store.get(card.get_attribute("data-job") or "").state == "cancelled"  # type: ignore[union-attr]


def test_more_jobs_than_a_browser_has_connections(visit: Visit, images: Served) -> None:
    images.supervisor.held = True
    try:
        for index in range(9):
            visit.generate(f"one of many {index}")
            expect(visit.card(f"one of many {index}")).to_be_visible()
        expect(visit.card("one of many 8")).to_contain_text("In the queue, 8 before it")
    finally:
        images.supervisor.held = False
    expect(visit.running).to_have_count(0)
    shown = visit.gallery.locator(".prompt").all_inner_texts()
    assert [text for text in shown if "one of many" in text] == [f"one of many {index}" for index in range(8, -1, -1)]


def test_jobs_of_other_clients_are_shown(visit: Visit, images: Served) -> None:
    body = {"prompt": "sent by curl", "size": "40x40", "n": 2}
    status, job, _ = images.call("POST", "/v1/images/generations", body, {"Prefer": "respond-async"})
    assert status == 202
    assert visit.loaded("sent by curl", 2) == [{"width": 40, "height": 40}] * 2
    assert images.call("DELETE", f"/v1/images/{job['id']}")[0] == 200
    expect(visit.card("sent by curl")).to_have_count(0)


def test_use_settings_again(visit: Visit) -> None:
    settings = {"width": "32", "height": "64", "num_inference_steps": "3", "seed": "5", "true_cfg_scale": "2.5"}
    visit.generate("again and again", negative_prompt="fog", n="2", **settings)
    visit.loaded("again and again", 2)
    visit.page.reload()
    visit.card("again and again").get_by_role("button", name="Reuse").click()
    for name, value in {"prompt": "again and again", "negative_prompt": "fog", "n": "2", **settings}.items():
        expect(visit.page.locator(f"#{name}")).to_have_value(value)
    expect(visit.page.locator("#negative_prompt")).to_be_visible()
    expect(visit.page.locator("#prompt")).to_be_focused()


def test_settings_without_a_field_are_used_again(visit: Visit, images: Served, tmp_path: Path) -> None:
    sent = {"prompt": "from curl", "size": "48x32", "sigmas": [1.0, 0.25], "seed": 2**62 + 1}
    look = {"output_format": "jpeg", "output_compression": 80}
    first = images.call("POST", "/v1/images/generations", {**sent, **look}, LATER)[1]
    (tmp_path / "start.png").write_bytes(picture())
    visit.loaded("from curl")
    visit.card("from curl").get_by_role("button", name="Reuse").click()
    line = visit.page.locator("#further")
    expect(line).to_contain_text("sigmas = [1,0.25]")
    expect(line).to_contain_text('output_format = "jpeg", output_compression = 80')

    def made(count: int) -> dict[str, Any]:
        visit.page.get_by_role("button", name="Generate").click()
        expect(visit.card("from curl")).to_have_count(count)
        return images.call("GET", "/v1/images?limit=1")[1]["data"][0]

    again = made(2)
    same = ("prompt", "size", "seed", "parameters", "output_format", "output_compression")
    assert {name: again[name] for name in same} == {name: first[name] for name in same}
    visit.page.get_by_label("Image").set_input_files(tmp_path / "start.png")  # another way to send them
    again = made(3)
    assert (again["parameters"], again["input_images"]) == (first["parameters"], 1)
    line.get_by_role("button", name="Leave them out").click()
    expect(line).to_be_hidden()
    assert "sigmas" not in made(4)["parameters"]


def test_enlarge(visit: Visit) -> None:
    visit.page.locator("#prompt").fill("a large one")
    expect(visit.page.get_by_role("button", name="Generate")).to_be_enabled()
    visit.page.locator("#prompt").press("Control+Enter")
    visit.loaded("a large one")
    visit.card("a large one").get_by_role("button", name="Enlarge").click()
    viewer = visit.page.get_by_role("dialog", name="a large one")
    expect(viewer.locator("img")).to_be_visible()
    with visit.page.expect_download() as download:
        viewer.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename.endswith(".png")
    visit.page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(visit.card("a large one").get_by_role("button", name="Enlarge")).to_be_focused()


def test_only_the_fields_of_the_model(browser: Browser, videos: Served, visit: Visit) -> None:
    shown = "[data-field]:not([hidden])"
    expect(visit.page.get_by_label("Steps")).to_have_attribute("placeholder", "3")
    names = visit.page.locator(shown).evaluate_all("fields => fields.map((field) => field.dataset.field)")
    assert not {"seconds", "num_frames", "fps"} & set(names)
    assert {"prompt", "image", "true_cfg_scale", "n", "seed", "width"} <= set(names)
    with visiting(browser, videos.url) as video:
        expect(video.page.locator("#seconds")).to_have_attribute("placeholder", re.compile(r"\d"))
        names = video.page.locator(shown).evaluate_all("fields => fields.map((field) => field.dataset.field)")
        assert {"seconds", "num_frames", "fps", "image"} <= set(names)
        assert "true_cfg_scale" not in names


def test_a_video_from_a_picture(browser: Browser, videos: Served, tmp_path: Path) -> None:
    (tmp_path / "start.png").write_bytes(picture((48, 32)))
    with visiting(browser, videos.url) as visit:
        visit.page.get_by_label("Image").set_input_files(tmp_path / "start.png")
        expect(visit.page.locator("#preview")).to_be_visible()
        visit.generate("it begins to move", width=48, height=32, num_frames=9, fps=8)
        assert visit.loaded("it begins to move") == [{"width": 48, "height": 32}]
        card = visit.card("it begins to move")
        assert card.locator("video").evaluate("video => video.muted && !video.autoplay")
        job = videos.store.get(card.get_attribute("data-job") or "")
        assert job is not None
        assert job.inputs == ("input-0.png",)
        assert (job.request["num_frames"], job.request["fps"]) == (9, 8)
        with visit.page.expect_download() as download:
            card.get_by_role("link", name="Download").click()
        assert b"ftyp" in download.value.path().read_bytes()[:16]
        # What is typed last counts: seconds instead of frames.
        visit.generate("by seconds", seconds=2)
        visit.loaded("by seconds")
        job = videos.store.get(visit.card("by seconds").get_attribute("data-job") or "")
        assert job is not None
        assert job.request["num_frames"] == 17
        # The tab still has the picture of a job that was sent from it, another one has not.
        visit.page.get_by_role("button", name="Clear settings").click()
        card.get_by_role("button", name="Reuse").click()
        expect(visit.page.locator("#preview")).to_be_visible()
        visit.page.reload()
        card.get_by_role("button", name="Reuse").click()
        expect(visit.page.get_by_label("Image")).to_have_accessible_description(re.compile("Choose it again"))


def test_several_pictures(visit: Visit, images: Served) -> None:
    expect(visit.page.get_by_label("Images")).to_have_attribute("multiple", "")
    files = [
        {"name": f"{index}.png", "mimeType": "image/png", "buffer": picture((24 + index, 24))} for index in range(2)
    ]
    visit.page.get_by_label("Images").set_input_files(files)  # type: ignore[arg-type]
    expect(visit.page.locator("#preview img")).to_have_count(2)
    visit.generate("both of them")
    visit.loaded("both of them")
    job = images.store.get(visit.card("both of them").get_attribute("data-job") or "")
    assert job is not None
    assert job.details["input_sizes"] == [[24, 24], [25, 24]]
    visit.page.get_by_role("button", name="Remove").click()
    expect(visit.page.locator("#preview")).to_be_hidden()
    visit.card("both of them").get_by_role("button", name="Reuse").click()
    expect(visit.page.locator("#preview img")).to_have_count(2)


def test_notes_can_be_opened(visit: Visit) -> None:
    visit.generate("a note please")
    visit.loaded("a note please")
    card = visit.card("a note please")
    expect(card.get_by_text("it was rounded")).to_be_hidden()
    card.get_by_text("1 note", exact=True).click()
    expect(card.get_by_text("it was rounded")).to_be_visible()
    card.get_by_role("button", name="Enlarge").click()
    expect(visit.page.get_by_role("dialog").get_by_text("it was rounded")).to_be_visible()


def test_a_model_that_needs_a_picture(browser: Browser, tmp_path: Path) -> None:
    names = ("image", "prompt", "num_inference_steps")
    info = ModelInfo(PipelineSignature("QwenImageEditPipeline", names))
    with serving(tmp_path, info, model="a/model") as served, visiting(browser, served.url) as visit:
        expect(visit.page.get_by_label("Steps")).to_be_visible()
        expect(visit.page.get_by_label("Width")).to_be_hidden()
        visit.generate("brighter")
        expect(visit.page.get_by_label("Image")).to_have_attribute("aria-invalid", "true")
        files = {"name": "in.png", "mimeType": "image/png", "buffer": picture((24, 24))}
        visit.page.get_by_label("Image").set_input_files(files)  # type: ignore[arg-type]
        visit.generate("brighter")
        visit.loaded("brighter")


@pytest.mark.full
def test_a_real_server(browser: Browser, tmp_path: Path) -> None:
    """A picture, a cancelled job, and the same picture again from a restarted server."""
    with real_server("tiny/qwen-image", tmp_path) as url, visiting(browser, url) as visit:
        expect(visit.page.locator("#state")).to_have_text("Ready")
        visit.generate("a real one", width=64, height=64, num_inference_steps=4, seed=7)
        assert visit.loaded("a real one") == [{"width": 64, "height": 64}]
        visit.generate("a long one", num_inference_steps=200)
        card = visit.card("a long one")
        expect(card).to_contain_text(re.compile(r"Step \d+ of 200 · .* s per step · about .* left"))
        card.get_by_role("button", name="Cancel").click()
        expect(card).to_have_attribute("data-status", "cancelled")
        with visit.page.expect_download() as download:
            visit.card("a real one").get_by_role("link", name="Download").click()
        before = download.value.path().read_bytes()
        assert Image.open(io.BytesIO(before)).getextrema() != ((0, 0), (0, 0), (0, 0))
    with real_server("tiny/qwen-image", tmp_path) as url, visiting(browser, url) as visit:
        assert visit.loaded("a real one") == [{"width": 64, "height": 64}]
        visit.card("a real one").get_by_role("button", name="Reuse").click()
        visit.card("a real one").get_by_role("button", name="Delete").click()
        visit.card("a real one").get_by_role("button", name="Delete?").click()
        expect(visit.card("a real one")).to_have_count(0)
        visit.page.get_by_role("button", name="Generate").click()
        assert visit.loaded("a real one") == [{"width": 64, "height": 64}]
        with visit.page.expect_download() as download:
            visit.card("a real one").get_by_role("link", name="Download").click()
        assert _pixels(download.value.path().read_bytes()) == _pixels(before)


def _pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as made:
        return made.tobytes()
