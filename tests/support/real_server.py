"""Real servers of tiny models: the command in a process of its own, its HTTP interface, its log and its processes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from bench.served import children
from shardit.diffusion.output.output import Output
from shardit.engine.process.fork_client import FORK_SERVER
from shardit.models import tiny
from shardit.server.process.api_process import API
from tests.support.paths import SUPPORT
from tests.support.real_omni import by_diffusers, same

WAIT_S = 240.0


class RealServer:
    """The command `shardit serve`; `start` can be called again after its end. Everything has bounded waits."""

    def __init__(self, model: str, folder: Path, *flags: str, faulty: bool = False):
        self.model, self.folder, self.faulty = model, folder, faulty
        self.flags = list(flags)
        self.api_key = flags[flags.index("--api-key") + 1] if "--api-key" in flags else ""
        self.port = 0
        self.log_path = folder.parent / f"{folder.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._from = 0

    def start(self) -> None:
        """Start the command and wait until it logs its address. The first port is kept."""
        begin = [str(SUPPORT / "serve_faulty.py")] if self.faulty else ["-m", "shardit", "serve"]
        arguments = [*begin, self.model, "--data-dir", str(self.folder), "--port", str(self.port), *self.flags]
        path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
        self._from = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        self.wait(lambda: self.events("serving"), "serving")
        self.url = self.events("serving")[0]["url"]
        self.port = int(self.url.rpartition(":")[2])

    # What it says.

    def log(self, whole: bool = False) -> list[dict[str, Any]]:
        """Return the lines of its log since the latest start, or all; those that are not JSON as {"event": line}."""
        with self.log_path.open("rb") as file:
            file.seek(0 if whole else self._from)
            lines = file.read().decode(errors="replace").splitlines()
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"event": line})
        return [line for line in found if isinstance(line, dict)]

    def events(self, name: str, whole: bool = False) -> list[dict[str, Any]]:
        """The lines of one event."""
        return [line for line in self.log(whole) if line.get("event") == name]

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
        """Wait until a condition holds; return its value."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s\n{self.log_path.read_text()[-5000:]}"
            assert self.process is not None
            if self.process.poll() is not None and what != "the end":
                raise AssertionError(f"{what}: it has ended\n{self.log_path.read_text()[-5000:]}")
            time.sleep(0.02)
        return found

    # HTTP.

    def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        """Return status and body (JSON if possible). Raises OSError without an answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
        headers.update({} if key is None else {"Idempotency-Key": key})
        headers.update({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30.0) as answer:
                status, kind, content = answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, kind, content = error.code, error.headers.get("Content-Type", ""), error.read()
        except urllib.error.URLError as error:
            raise OSError(str(error)) from error
        return status, json.loads(content) if kind.startswith("application/json") else content

    def patiently(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        """Call as `call`, repeatedly while there is no answer or the answer is "later"."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError, EOFError):
                status, answer = self.call(method, path, body, key)
                if status != 503:
                    return status, answer
            assert time.monotonic() < deadline, "nobody answers"
            time.sleep(0.1)

    @property
    def path(self) -> str:
        """Of the jobs of this model."""
        takes_frames = "num_frames" in tiny.defaults(self.model.removeprefix("tiny/"))
        return "/v1/videos" if takes_frames else "/v1/images"

    def submit(self, seed: int, prompt: str = "a cat", key: str | None = None, **call: Any) -> str:
        """Send a request, with an idempotency key if there is one; the id of its job."""
        body = {**tiny.defaults(self.model.removeprefix("tiny/")), "prompt": prompt, "seed": seed, **call}
        to = self.path if self.path == "/v1/videos" else f"{self.path}/generations"
        status, answer = self.patiently("POST", to, body, key)
        assert status in (200, 202), answer
        return answer["id"]

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as the server shows it."""
        status, answer = self.patiently("GET", f"{self.path}/{job_id}")
        assert status == 200, answer
        return answer

    def ready(self) -> dict[str, Any] | None:
        """What /ready says where it says yes."""
        with contextlib.suppress(OSError):
            status, answer = self.call("GET", "/ready")
            return answer if status == 200 else None
        return None

    def wait_ready(self) -> None:
        """Until the ranks are up."""
        self.wait(self.ready, "/ready")

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job, once it has ended."""

        def look() -> Any:
            shown = self.job(job_id)
            return shown if shown["status"] in ("completed", "failed", "cancelled") else None

        return self.wait(look, f"the end of {job_id}")

    def stepping(self, job_id: str, times: int = 1) -> None:
        """Wait until it has begun so often."""
        self.wait(lambda: self.begun(job_id) >= times, f"start {times} of {job_id}")

    def begun(self, job_id: str) -> int:
        """How often ranks have begun it."""
        return sum(line["request_id"] == job_id for line in self.events("job_started", whole=True))

    def result(self, job_id: str) -> bytes:
        """The content of the first result."""
        tail = "content" if self.path == "/v1/videos" else "content/0"
        status, content = self.patiently("GET", f"{self.path}/{job_id}/{tail}")
        assert status == 200, content
        return content

    def check(self, job_id: str, seed: int, prompt: str = "a cat", **call: Any) -> None:
        """The job has completed, with the bits of plain diffusers."""
        shown = self.ended(job_id)
        assert shown["status"] == "completed", shown
        wanted = expected(self.model.removeprefix("tiny/"), seed, prompt, tuple(sorted(call.items())))
        assert same(wanted, pictures(self.result(job_id))), job_id

    # Processes.

    def pids(self) -> dict[str, int]:
        """Return its living processes by kind: supervisor, api, fork server, rank 0, rank 1, ..."""
        assert self.process is not None
        found = {"supervisor": self.process.pid}
        for pid in children(self.process.pid):
            what = command(pid)
            if API in what:
                found["api"] = pid
            elif FORK_SERVER in what:
                found["fork_server"] = pid
                for rank, one in enumerate(sorted(children(pid))):
                    found[f"rank {rank}"] = one
        return found

    def kill(self, what: str, number: int = signal.SIGKILL) -> float:
        """Send a signal to one of them; when that was, in seconds since 1970."""
        now = time.time()
        os.kill(self.pids()[what], number)
        return now

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        """End it; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.end()

    def end(self) -> None:
        """Whatever is left, by force."""
        if self.process is not None and self.process.poll() is None:
            for pid in self.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(10)


@contextlib.contextmanager
def real_server(model: str, folder: Path, *flags: str, faulty: bool = False) -> Iterator[RealServer]:
    """A server whose ranks are up."""
    server = RealServer(f"tiny/{model}", folder, *flags, faulty=faulty)
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.end()


@functools.lru_cache(maxsize=50)
def expected(name: str, seed: int, prompt: str, call: tuple[tuple[str, Any], ...]) -> list[Image.Image]:
    """Return the result of plain diffusers, as read from a file."""
    made = by_diffusers(name, seed, prompt=prompt, **dict(call))
    is_video = "num_frames" in tiny.defaults(name)
    output = Output(prompt, seed, frames=[made]) if is_video else Output(prompt, seed, made)
    with tempfile.TemporaryDirectory() as folder:
        (path,) = output.save(Path(folder) / ("wanted.mp4" if is_video else "wanted.png"))
        return pictures(path.read_bytes())


def at(line: dict[str, Any]) -> float:
    """When a line was logged, in seconds since 1970."""
    return datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp()


def command(pid: int) -> str:
    """Its command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pictures(content: bytes) -> list[Image.Image]:
    """The picture, or the frames, of a file."""
    if content[4:8] == b"ftyp":
        import av

        with av.open(io.BytesIO(content)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    with Image.open(io.BytesIO(content)) as picture:
        return [picture.convert("RGB")]
