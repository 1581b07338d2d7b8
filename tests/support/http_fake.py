"""The real API process with a supervisor that is a thread of the test: it finishes jobs with small real files, slowly
or not at all, depending on their prompts."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shardit.diffusion.output.output import Output
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.process.channel import Channel, Closed
from shardit.server import estimate
from shardit.server.jobs.job import Job
from shardit.server.jobs.job_request import build_request
from shardit.server.jobs.store import Store
from shardit.server.messages import Changed, Measured, Ranks, Scrape, StepDone, Wake
from shardit.server.options import ServeOptions
from shardit.server.supervisor.result_files import write_results
from tests.support.api_processes import forked_api_process, new_api_process

WAIT_S = 60.0

_SHARED = [
    "generator",
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "output_type",
    "return_dict",
    "attention_kwargs",
    "callback_on_step_end",
    "max_sequence_length",
]
_WAN = [
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
]
_WAN_DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
_QWEN = [
    "prompt",
    "negative_prompt",
    "true_cfg_scale",
    "height",
    "width",
    "num_inference_steps",
    "sigmas",
    "guidance_scale",
]
_QWEN_DEFAULTS = {"height": None, "width": None, "num_inference_steps": 50, "true_cfg_scale": 4.0}

AUDIO = ModelInfo(
    signature=PipelineSignature(
        "StableAudioPipeline",
        ("prompt", "num_inference_steps", "audio_end_in_s", "num_waveforms_per_prompt", "output_type"),
        {"num_inference_steps": 2, "output_type": "pt"},
        outputs=("audios",),
        sample_rate=16000,
    ),
)
VIDEO = ModelInfo(
    signature=PipelineSignature(
        "WanPipeline", (*_WAN, "num_videos_per_prompt", *_SHARED), _WAN_DEFAULTS, native_fps=24.0
    ),
    signature_with_image=PipelineSignature(
        "WanImageToVideoPipeline",
        ("image", *_WAN, "num_videos_per_prompt", *_SHARED, "last_image"),
        _WAN_DEFAULTS,
        required=("image",),
        native_fps=24.0,
    ),
    notes=("a note of the ranks",),
)
IMAGE = ModelInfo(
    signature=PipelineSignature("QwenImagePipeline", (*_QWEN, "num_images_per_prompt", *_SHARED), _QWEN_DEFAULTS),
    signature_with_image=PipelineSignature(
        "QwenImageEditPlusPipeline", ("image", *_QWEN, "num_images_per_prompt", *_SHARED), _QWEN_DEFAULTS
    ),
)


class FakeSupervisor:
    """Runs the store's jobs one after the other. A prompt with "fail" fails, one with "slow" takes 200 steps of
    50 ms, one with "steady" 30; one with "note" gets a note.

    `held` leaves jobs in the queue; `lossy` sends no news.
    """

    def __init__(self, channel: Channel, store: Store, info: ModelInfo):
        self.channel, self.store, self.info = channel, store, info
        self.held = False
        self.lossy = False
        self.woken = threading.Event()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._work)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def tell(self, message: object) -> None:
        if not (self.lossy and isinstance(message, (Changed, StepDone))):
            self.channel.send(message)

    def stop(self) -> None:
        """After the API process has ended."""
        self._end.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _listen(self) -> None:
        try:
            while True:
                message = self.channel.recv()
                if isinstance(message, Wake):
                    self.woken.set()
                elif isinstance(message, Scrape):
                    self.tell(Measured(b"shardit_fake_metric 1.0\n"))
        except (Closed, OSError):
            pass

    def _work(self) -> None:
        while not self._end.is_set():
            job = None if self.held else next(iter(self.store.queued(1)), None)
            if job is None:
                self.woken.wait(0.1)
                self.woken.clear()
            elif self.store.start(job.id):
                try:
                    self.tell(Changed(job.id))
                    self._run(job)
                    self.tell(Changed(job.id))
                except (Closed, OSError):
                    return

    def _run(self, job: Job) -> None:
        if job.kind == "text":
            from tests.support.text_fake import run_text

            run_text(self, job, self._end.wait)
            return
        prompt = job.request.get("prompt") or ""
        steps = 200 if "slow" in prompt else 30 if "steady" in prompt else 2
        for step in range(1, steps + 1):
            self._end.wait(0.05 if steps > 2 else 0)
            self.tell(StepDone(job.id, step, steps, "denoise", 0.05))
            if job.id in self.store.to_cancel() or self._end.is_set():
                self.store.finish(job.id, "cancelled")
                return
        if "fail" in prompt:
            self.store.finish(job.id, "failed", error={"code": "ranks_died", "message": "a rank died"})
            return
        inputs = [self.store.files_of(job.id) / name for name in job.inputs]
        request = build_request(job.request, job.seed, inputs, self.info)
        size = (min(64, request.kwargs.get("width", 64)), min(64, request.kwargs.get("height", 64)))
        pictures = [
            Image.new("RGB", size, (job.seed % 256, 80, 80 + count % 100)) for count in range(request.num_outputs)
        ]
        video = self.info.signature.kind == "video"
        output = Output(
            prompt=request.prompt,
            seed=job.seed,
            images=() if video or self.info.signature.kind != "image" else pictures,
            audio=np.zeros((len(pictures), 1, 160), np.float32) if self.info.signature.kind == "audio" else None,
            sample_rate=request.sample_rate,
            texts=[prompt] if self.info.signature.kind == "text" else [],
            extra={"flags": [True], "embeds": np.ones((1, 2))} if "more" in prompt else {},
            frames=[[picture] * 3 for picture in pictures] if video else None,
            fps=request.fps,
        )
        names, _ = write_results(output, self.store.files_of(job.id), job.view)
        details = {"seconds": 0.1, "notes": ["it was rounded"] if "note" in prompt else []}
        details |= {"width": size[0], "height": size[1], "input_sizes": [list(item.size) for item in request.images]}
        self.store.finish(job.id, "completed", files=names, details=details)


class Served:
    """A running API process and its fake supervisor."""

    def __init__(self, options: ServeOptions, info: ModelInfo, state: str, held: bool, new: bool):
        self.options = options
        self.store = Store(options.data_dir)
        self.log = options.data_dir / "api.log"
        mine, theirs = socket.socketpair()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        channel = Channel(mine)
        with open(self.log, "wb") as log:
            start = new_api_process if new else forked_api_process
            self.process = start(theirs, self.listener, log)
        theirs.close()
        channel.send(options)
        self.supervisor = FakeSupervisor(channel, self.store, info)
        self.supervisor.held = held
        told = info if state == "ready" else None
        ranks = ({"rank": 0, "state": state, "pid": 1, "peak_bytes": 0},)
        channel.send(Ranks(state, info=told, ranks=ranks))  # pyright: ignore[reportArgumentType]
        self.supervisor.start()
        self.wait_for("/health" if state != "ready" else "/ready")

    def wait_for(self, path: str) -> None:
        """Until `path` answers 200."""
        until = time.monotonic() + WAIT_S
        while True:
            try:
                if self.call("GET", path)[0] == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < until, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is that) and headers. `body`: bytes, or a JSON value."""
        headers = {**(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return _read(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return _read(error.code, error.headers, error.read())

    def until(self, path: str, *states: str) -> Any:
        """The job at `path` once it is in one of these states."""
        end = time.monotonic() + WAIT_S
        while True:
            status, job, _ = self.call("GET", path)
            assert status == 200, job
            if job["status"] in states:
                return job
            assert time.monotonic() < end, job
            time.sleep(0.02)

    def until_empty(self) -> None:
        """Until the store has no job."""
        end = time.monotonic() + WAIT_S
        while self.store.counts():
            assert time.monotonic() < end, self.store.counts()
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.supervisor.stop()
            self.supervisor.channel.close()
            self.listener.close()
            self.store.close()


def _read(status: int, headers: Any, data: bytes) -> tuple[int, Any, dict[str, str]]:
    is_json = data and headers.get("Content-Type", "").startswith("application/json")
    return status, json.loads(data) if is_json else data, {name.lower(): value for name, value in headers.items()}


@contextmanager
def serving(
    folder: Path,
    info: ModelInfo | None = None,
    state: str = "ready",
    memory: Any = None,
    held: bool = False,
    new: bool = False,
    **options: Any,
) -> Iterator[Served]:
    """Start a server with its data in `folder`; `memory` is the learned memory use.
    new: the API process has an interpreter of its own, which takes a second longer."""
    info = IMAGE if info is None else info
    model = "tiny/wan2.2-ti2v" if info is VIDEO else "tiny/qwen-image"
    folder.mkdir(parents=True, exist_ok=True)
    if memory is not None:
        store = Store(folder)
        store.remember(estimate.MEMORY, memory)
        store.close()
    served = Served(ServeOptions(**{"model": model, "data_dir": folder, **options}), info, state, held, new)
    try:
        yield served
    finally:
        served.stop()


def picture(size: tuple[int, int] = (32, 24), kind: str = "PNG") -> bytes:
    """A small picture file."""
    into = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(into, kind)
    return into.getvalue()


def form(fields: dict[str, Any]) -> tuple[bytes, str]:
    """A multipart body and its content type; files are (name, content)."""
    parts = []
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            file = f'; filename="{item[0]}"' if isinstance(item, tuple) else ""
            content = item[1] if isinstance(item, tuple) else str(item).encode()
            head = f'--limit\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
            parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + b"--limit--\r\n", "multipart/form-data; boundary=limit"
