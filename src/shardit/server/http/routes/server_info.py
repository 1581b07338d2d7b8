"""Routes about the server: models, health, readiness, metrics, and the data of the page."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.language.info import LanguageInfo
from shardit.language.request.defaults import recommended
from shardit.server.http.schema.errors import ApiError, answers
from shardit.server.http.state.context import Context
from shardit.server.http.state.metrics import CONTENT_TYPE
from shardit.server.http.submit.resolve import pipeline_names
from shardit.server.http.submit.submit import job_kind
from shardit.server.jobs.job import Kind
from shardit.server.messages import Ranks, RanksState
from shardit.server.options import RequestLimits


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "shardit"


class Models(BaseModel):
    """The list of served models, which has one entry."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether jobs can run now, and the state of the ranks."""

    state: RanksState
    reason: str
    restarts: int
    ranks: list[dict[str, Any]]


class ServerInfo(Readiness):
    """State and properties of the server, for its page."""

    model: str
    kind: Kind | None = Field(description="Kind of the results; null before the model is known.")
    takes_image: bool
    needs_image: bool
    most_images: int = Field(description="Maximum number of input images.")
    parameters: list[str] = Field(description="Arguments of the model's pipeline that a request may give.")
    defaults: dict[str, Any] = Field(description="Defaults of the pipeline.")
    example_prompt: str = Field(description="A prompt for a trained tiny model; else empty.")
    default_fps: float | None
    queued: int
    in_progress: int
    queue_size: int
    limits: dict[str, int | None]
    notes: list[str]


def server_info_routes(context: Context) -> APIRouter:
    """Return the routes about the server itself."""
    router = APIRouter(tags=["server"])
    model = Model(id=context.options.name, created=int(context.started_at))

    @router.get("/health", response_model=Health)
    async def health() -> Any:
        """Whether the process answers."""
        return Health()

    @router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness, "description": "Not yet."}})
    async def ready(request: Request) -> Any:
        """Whether the ranks can run jobs now; 503 until they can."""
        ranks = context.live_state.ranks
        shown = _readiness(ranks)
        if getattr(request.state, "unverified_host", False):  # sent under an unverified host name
            shown |= {"reason": "", "ranks": []}
        if ranks.state == "ready":
            return shown
        return JSONResponse(shown, 503, {"Retry-After": "5"})

    @router.get("/metrics", responses=answers(401), response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        ours = context.metrics.text()
        return Response(ours + (await context.live_state.measured() or b""), media_type=CONTENT_TYPE)

    @router.get("/v1/models", response_model=Models, responses=answers(401), tags=["models"])
    async def list_models() -> Any:
        """The served model."""
        return Models(data=[model])

    @router.get("/v1/models/{model_id:path}", response_model=Model, responses=answers(401, 404), tags=["models"])
    async def retrieve_model(model_id: str) -> Any:
        """The served model by its name."""
        if model_id != context.options.name:
            raise ApiError(404, f"there is no model {model_id!r} here", code="model_not_found")
        return model

    @router.get("/v1/server", response_model=ServerInfo, responses=answers(401))
    async def server() -> Any:
        """State and properties of the server, for its page. Ours, not OpenAI's."""
        await context.live_state.known()
        return await run_in_threadpool(_server, context)

    return router


def _readiness(ranks: Ranks) -> dict[str, Any]:
    return {
        "state": ranks.state,
        "reason": ranks.reason,
        "restarts": ranks.restarts,
        "ranks": [dict(rank) for rank in ranks.ranks],
    }


def _server(context: Context) -> dict[str, Any]:
    info, options, counts = context.live_state.info, context.options, context.store.counts()
    takes = info.signature if isinstance(info, ModelInfo) else None
    with_image = info.signature_with_image if isinstance(info, ModelInfo) else None
    return {
        **_readiness(context.live_state.ranks),
        "model": options.name,
        "kind": "text" if options.of_language else job_kind(takes) if takes else None,
        "takes_image": bool((takes and takes.image_name) or with_image),
        "needs_image": bool(takes and takes.needs_image),
        "most_images": _most_images(with_image or takes, options.limits),
        "parameters": pipeline_names(info if isinstance(info, ModelInfo) else None),
        "defaults": _defaults(context),
        "example_prompt": _example_prompt(context),
        "default_fps": takes.default_fps if takes and takes.kind == "video" else None,
        "queued": counts.get("queued", 0),
        "in_progress": counts.get("in_progress", 0),
        "queue_size": options.queue_size,
        "limits": vars(options.limits),
        "notes": list(info.notes) if info else [],
    }


def _example_prompt(context: Context) -> str:
    from shardit.models import tiny

    options = context.options
    of_pipeline = options.model.startswith("tiny/") and not options.of_language
    return tiny.example_prompt(options.model.removeprefix("tiny/")) if of_pipeline else ""


def _most_images(takes: PipelineSignature | None, limits: RequestLimits) -> int:
    if takes is None or takes.image_name is None:
        return 0
    return 1 if takes.one_image else limits.input_images


def _defaults(context: Context) -> dict[str, Any]:
    from shardit.models import tiny

    info, options = context.live_state.info, context.options
    if isinstance(info, LanguageInfo):
        return recommended(info.defaults)
    if info is None:
        return {}
    names = set(pipeline_names(info))
    shown = {name: value for name, value in info.signature.defaults.items() if name in names and value is not None}
    filled = tiny.filled_in(options.model.removeprefix("tiny/"), ()) if options.model.startswith("tiny/") else {}
    return {**shown, **filled}
