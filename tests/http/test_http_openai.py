"""The real openai package against the API process."""

from __future__ import annotations

import base64
import io
from typing import Any

import av
import openai
import pytest
from PIL import Image

from tests.support.http_fake import WAIT_S, Served, picture


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)


def test_generate_images(images: Served) -> None:
    answer = client_of(images).images.generate(model="tiny/qwen-image", prompt="a cat", size="64x48", n=2)
    assert answer.size == "64x48"
    assert answer.data is not None
    assert len(answer.data) == 2
    for item in answer.data:
        assert item.b64_json is not None
        with Image.open(io.BytesIO(base64.b64decode(item.b64_json))) as made:
            assert made.size == (64, 48)


def test_images_by_url(images: Served) -> None:
    answer = client_of(images).images.generate(prompt="a cat", size="64x48", response_format="url")
    assert answer.data is not None
    url = answer.data[0].url
    assert url is not None
    assert url.startswith(images.url)
    status, content, headers = images.call("GET", url.removeprefix(images.url))
    assert status == 200
    assert headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(content)).size == (64, 48)


def test_fields_without_meaning_are_taken(images: Served) -> None:
    for quality in ("standard", "auto"):
        answer = client_of(images).images.generate(
            prompt="a cat", size="64x48", user="me", quality=quality, moderation="low", background="opaque"
        )
        assert answer.data is not None
        job = images.store.get(answer.model_dump()["id"])
        assert job is not None
        assert job.request.keys() == {"prompt", "width", "height", "num_inference_steps"}
    with pytest.raises(openai.BadRequestError, match=r"quality 'hd' has no meaning here.*'auto' or 'standard'"):
        client_of(images).images.generate(prompt="a cat", quality="hd")


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_pictures_in_the_format_that_was_asked_for(images: Served, name: Any, kind: str) -> None:
    client = client_of(images)
    answer = client.images.generate(prompt="a cat", size="64x48", output_format=name, output_compression=100)
    assert (answer.output_format, answer.data is not None) == (name, True)
    assert answer.data is not None
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))) as made:
        assert (made.format, made.size) == (kind, (64, 48))
    job = answer.model_dump()["id"]
    status, content, headers = images.call("GET", f"/v1/images/{job}/content/0")
    assert (status, headers["content-type"]) == (200, f"image/{name}")
    assert content == base64.b64decode(answer.data[0].b64_json or "")
    assert images.call("GET", f"/v1/images/{job}")[1]["output_format"] == name


def test_edits_take_format_and_user_as_form_fields(images: Served) -> None:
    answer = client_of(images).images.edit(
        image=("a.png", picture((40, 30))), prompt="x", user="7", output_format="webp", output_compression=40
    )
    assert answer.output_format == "webp"


@pytest.mark.parametrize("several", [False, True])
def test_edit_images(images: Served, several: bool) -> None:
    files = [("a.png", picture((40, 30))), ("b.jpg", picture((20, 10), "JPEG"))]
    answer = client_of(images).images.edit(image=files if several else files[0], prompt="brighter", size="32x32")
    assert answer.data is not None
    job = images.store.get(answer.model_dump()["id"])
    assert job is not None
    assert job.inputs == (("input-0.png", "input-1.jpg") if several else ("input-0.png",))
    assert job.details["input_sizes"] == ([[40, 30], [20, 10]] if several else [[40, 30]])


def test_a_video_from_creation_to_deletion(videos: Served) -> None:
    client = client_of(videos)
    video = client.videos.create(model="tiny/wan2.2-ti2v", prompt="a cat runs", seconds="1", size="64x32")
    assert video.object == "video"
    assert video.seconds == "1"
    assert video.size == "64x32"
    done = client.videos.poll(video.id, poll_interval_ms=20)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    job = videos.store.get(video.id)
    assert job is not None
    assert job.request["num_frames"] == 25
    content = client.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].average_rate == 24
    assert video.id in [item.id for item in client.videos.list(limit=1)]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_create_and_poll_with_a_picture(videos: Served) -> None:
    video = client_of(videos).videos.create_and_poll(
        prompt="it moves", input_reference=("start.png", picture((48, 32))), size="48x32", poll_interval_ms=20
    )
    assert video.status == "completed"
    job = videos.store.get(video.id)
    assert job is not None
    assert job.inputs == ("input-0.png",)


def test_diffusers_names_through_extra_body(videos: Served) -> None:
    video = client_of(videos).videos.create(
        prompt="a cat",
        extra_body={"num_frames": 9, "num_inference_steps": 3, "guidance_scale": 4.5, "seed": 7, "fps": 8},
    )
    job = videos.store.get(video.id)
    assert job is not None
    assert job.seed == 7
    assert {name: job.request[name] for name in ("num_frames", "num_inference_steps", "guidance_scale", "fps")} == {
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": 4.5,
        "fps": 8.0,
    }
    assert video.model_dump()["seed"] == 7


def test_errors_arrive_as_the_client_knows_them(videos: Served) -> None:
    client = client_of(videos)
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a cat", size="big")  # pyright: ignore[reportArgumentType]
    assert caught.value.param == "size"
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.create(prompt="a cat", model="sora-2")
    assert missing.value.code == "model_not_found"


def test_models(images: Served) -> None:
    client = client_of(images)
    assert [model.id for model in client.models.list()] == ["tiny/qwen-image"]
    assert client.models.retrieve("tiny/qwen-image").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
