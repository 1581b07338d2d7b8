"""Turns a body into a stored job. Everything is checked before, by building the very request that the ranks will
run."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from PIL import Image
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.process.memory import limit_bytes
from shardit.errors import InputError
from shardit.params import seed_or_drawn
from shardit.server import estimate
from shardit.server.http.schema.errors import ApiError, busy, from_input_error
from shardit.server.http.schema.fields import IMAGES, check_fields
from shardit.server.http.schema.jobs import length
from shardit.server.http.state.context import Context
from shardit.server.http.submit.body import Body, read_body
from shardit.server.http.submit.image_checks import check_header, check_whole
from shardit.server.http.submit.input_images import input_images
from shardit.server.http.submit.resolve import (
    arguments,
    check_encoding,
    check_model,
    encoding_of,
    pipeline_names,
    with_prompt,
)
from shardit.server.jobs.admission import Conflict, QueueFull
from shardit.server.jobs.job import Job, Kind, NewJob
from shardit.server.jobs.job_request import build_request
from shardit.server.options import ServeOptions
from shardit.server.unservable import unservable

_RETRY_AFTER_S = 5.0
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class Accepted:
    """A stored job, and the form of its answer."""

    job: Job
    response_format: str


def job_kind(takes: PipelineSignature) -> Kind:
    """Return the kind of the jobs of a pipeline."""
    return takes.kind if takes.kind in ("image", "video") else "generation"


async def submit_job(
    request: Request,
    context: Context,
    kind: Kind,
    model: type[BaseModel],
    *,
    waits: bool,
    needs_image: bool = False,
    one: bool = False,
) -> Accepted:
    """Read, check and store a request. needs_image: it must have an input image. one: its answer is one file.
    Raises ApiError."""
    check_open(context)
    if context.options.of_language:
        text = "this server makes texts; use POST /v1/chat/completions or POST /v1/completions"
        raise ApiError(400, text, code="wrong_kind", param="model")
    key = _idempotency_key(request)
    body = await read_body(request, model, context.options.limits)
    info = await context.live_state.known()
    if not isinstance(info, ModelInfo):
        raise not_known()
    _check_kind(info.signature, kind)
    if problem := unservable(info.signature):
        raise ApiError(400, problem, code="unsupported_model", param="model")
    values = check_fields(model, with_prompt(body.values, info), pipeline_names(info))
    check_model(values, context.options)
    if one and values.get("n", 1) > 1:
        text = "n must be 1 if the answer is one file; for several make a job, without /sync"
        raise ApiError(400, text, code="invalid_value", param="n")
    field, takes = _image_field(values, body, info, needs_image)
    asked = arguments(values, takes, context.options)
    check_encoding(values, takes)
    images = {} if field is None else await _images(field, values, body, takes, context)
    # A client that sends a key can ask again for the result, so its job continues without the connection.
    waits = waits and key is None

    def store() -> Job:
        whose = owner(request)
        new, work = _new_job(
            asked, values, images, field, takes, info, context, kind, waits=waits, key=key, owner=whose
        )
        job, is_new = store_job(context, new, work)
        if is_new:
            context.live_state.wake()
        return job

    job = await run_in_threadpool(store)
    return Accepted(job, values.get("response_format", "auto"))


def check_open(context: Context) -> None:
    """Raise ApiError if the server is about to stop."""
    if context.live_state.stopping:
        raise busy("the server is about to stop; try again later", _RETRY_AFTER_S, "stopping")


def not_known() -> ApiError:
    """Return the error while nothing is known of the model."""
    text = "the model is being loaded, and its files do not say what it takes; try again soon"
    return busy(text, _RETRY_AFTER_S, "loading")


def owner(request: Request) -> str | None:
    """Return the owner of the request; see `middleware.py`."""
    return request.scope.get("state", {}).get("owner")


def _idempotency_key(request: Request) -> str | None:
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1 or not all(map(_KEY.fullmatch, keys)):
        text = "the header Idempotency-Key must be 1 to 255 visible ASCII characters, and be given once"
        raise ApiError(400, text, code="invalid_value", param="Idempotency-Key")
    return keys[0] if keys else None


def _check_kind(takes: PipelineSignature, kind: Kind) -> None:
    made = job_kind(takes)
    if made != kind:
        images = "edits" if takes.needs_image else "generations"
        right = {"image": f"POST /v1/images/{images}", "video": "POST /v1/videos"}.get(made, "POST /v1/generations")
        what = f"{made}s" if made != "generation" else takes.kind
        raise ApiError(400, f"this server makes {what}; use {right}", code="wrong_kind", param="model")


def _image_field(
    values: Mapping[str, Any], body: Body, info: ModelInfo, needed: bool
) -> tuple[str | None, PipelineSignature]:
    """Return the field with input images, if any, and the pipeline that will run then."""
    plain, takes = info.signature, info.signature_with_image or info.signature
    given = next((name for name in IMAGES if body.uploads.get(name) or values.get(name) not in (None, [])), None)
    if given is None and plain.needs_image:
        where = "image (POST /v1/images/edits)" if plain.kind == "image" else "input_reference"
        text, name = f"{plain.class_name} needs an image; give one in {where}", where.split()[0]
        raise ApiError(400, text, code="missing_field", param=name)
    if given is not None and takes.image_name is None:
        text = f"{given}: {takes.class_name} takes no image; leave it out, or use a model that takes one"
        raise ApiError(400, text, code="invalid_value", param=given)
    if needed and takes.image_name is None:
        text = f"{takes.class_name} takes no image; use a model that takes one, or POST /v1/images/generations"
        raise ApiError(400, text, code="wrong_kind", param="model")
    if needed and given is None:
        raise ApiError(400, "image is missing; give one to edit", code="missing_field", param="image")
    return given, plain if given is None else takes


async def _images(
    field: str, values: Mapping[str, Any], body: Body, takes: PipelineSignature, context: Context
) -> dict[str, bytes]:
    """Return the checked input images by file name."""
    limits = context.options.limits
    async with context.fetching if context.options.fetch_hosts else nullcontext():
        found = await run_in_threadpool(input_images, values, body, context.options)
    if len(found) > 1 and takes.one_image:
        text = f"{field}: {takes.class_name} takes one image, there are {len(found)}; give one"
        raise ApiError(400, text, code="too_many_images", param=field)
    suffixes = [check_header(data, limits, param) for param, data in found]
    for param, data in found:
        async with context.decoding:
            await run_in_threadpool(check_whole, data, param)
    return {f"input-{index}.{suffixes[index]}": data for index, (_, data) in enumerate(found)}


def _new_job(
    request: dict[str, Any],
    values: Mapping[str, Any],
    images: dict[str, bytes],
    image_field: str | None,
    takes: PipelineSignature,
    info: ModelInfo,
    context: Context,
    kind: Kind,
    *,
    waits: bool,
    key: str | None,
    owner: str | None,
) -> tuple[NewJob, estimate.Work]:
    seed = seed_or_drawn(values.get("seed"))
    stand_ins = [Image.new("RGB", (8, 8)) for _ in images]  # the real ones were decoded once, which is enough
    try:
        built = build_request(request, seed, stand_ins, info)
        work = estimate.work_of(request, takes)
    except InputError as error:
        raise from_input_error(error, {*values, *takes.choices, "prompt", "size"}) from error
    new = NewJob(
        kind=kind,
        request=request,
        seed=seed,
        cost=estimate.seconds(work, context.store.recall(estimate.SPEED)),
        inputs=images,
        view={
            **_view(request, takes, built.fps),
            **encoding_of(values),
            "image_field": image_field or "image",
            "model": context.options.name,
        },
        owner=owner,
        priority=values.get("priority", 0),
        waits=waits,
        idempotency_key=key,
        fingerprint=_fingerprint(kind, values, images, context.options),
    )
    return new, work


def _view(request: Mapping[str, Any], takes: PipelineSignature, fps: float) -> dict[str, Any]:
    width, height = (request.get(name) or takes.defaults.get(name) for name in ("width", "height"))
    shown: dict[str, Any] = {
        "size": f"{width}x{height}" if width and height else None,
        "n": request.get("num_outputs_per_prompt", 1),
    }
    if takes.kind == "video":
        frames = request.get("num_frames") or takes.defaults.get("num_frames")
        shown |= {"fps": fps, "seconds": length(frames, fps) if frames else None}
    return shown


def _fingerprint(kind: Kind, values: Mapping[str, Any], images: Mapping[str, bytes], options: ServeOptions) -> str:
    digests = [hashlib.sha256(data).hexdigest() for data in images.values()]
    asked = {name: value for name, value in values.items() if name not in ("image", "input_reference")}
    text = json.dumps([kind, asked, digests, options.served], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def store_job(context: Context, new: NewJob, work: estimate.Work) -> tuple[Job, bool]:
    """Put a job into the queue; returns it, and whether it is new. Waits for the disk. Raises ApiError."""
    options = context.options
    try:
        if not context.store.knows(new):
            estimate.refuse_if_too_large(work, context.store.recall(estimate.MEMORY), limit_bytes(1))
        return context.store.accept(new, queue_size=options.queue_size, of_owner=options.limits.jobs_per_key)
    except QueueFull as error:
        raise busy(str(error), error.retry_after_s, "queue_full", 429) from error
    except InputError as error:
        raise from_input_error(error, {"size"}) from error
    except Conflict as error:
        raise ApiError(409, str(error), code="idempotency_conflict", param="Idempotency-Key") from error
    except (OSError, sqlite3.Error) as error:
        raise busy(f"the job cannot be stored: {error}", 10, "storage") from error
