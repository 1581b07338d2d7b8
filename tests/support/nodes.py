"""Servers whose nodes are processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from PIL import Image

from shardit.models.tiny.language import language_folder, tokenizer
from shardit.server.jobs.job import NewJob
from shardit.server.jobs.store import Store
from tests.support.paths import ROOT

CALL = {"prompt": "a cat", "height": 128, "width": 128, "num_inference_steps": 2, "max_sequence_length": 32}


TEXT_PROMPT = [70, 71, 72, 73, 74]


def expected_text() -> str:
    """What plain transformers makes of `TEXT_PROMPT`, on one rank."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language_folder("tiny/llama"))
    made = model.generate(torch.tensor([TEXT_PROMPT]), do_sample=False, max_new_tokens=12)
    return tokenizer().decode(made[0, len(TEXT_PROMPT) :], skip_special_tokens=True)


class Servers:
    """The processes of one server, and its jobs."""

    def __init__(self, folder: pathlib.Path):
        self.data, self.logs = folder / "data", folder / "logs"
        self.logs.mkdir()
        self.processes: list[subprocess.Popen] = []
        self.store = Store(self.data)

    def run(self, *command: str, cwd: pathlib.Path | None = None, **environment: str) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        log = (self.logs / str(len(self.processes))).open("w")
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            )
        )
        return self.processes[-1]

    def torchrun(self, *flags: str, restarts: int = 0, cwds: tuple[pathlib.Path | None, ...] = (None, None)) -> None:
        """Two nodes with one rank each."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            master = free.getsockname()[1]
        for node, cwd in enumerate(cwds):
            nodes = (f"--nnodes={len(cwds)}", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1")
            more = (f"--master-port={master}", f"--max-restarts={restarts}", "-m", "shardit", "serve", *flags)
            self.run("torch.distributed.run", *nodes, *more, f"--data-dir={self.data}", "--port=0", cwd=cwd)

    def ask(self, **more: Any) -> str:
        """Put a job into the queue."""
        return self.store.accept(NewJob("image", {**CALL, **more}, 7, 1.0), queue_size=10)[0].id

    def result(self, job_id: str, timeout_s: float = 200) -> Image.Image:
        """The picture of a job, when it has completed."""
        self.wait(lambda: (job := self.store.get(job_id)) is not None and job.ended, timeout_s)
        job = self.store.get(job_id)
        assert job is not None
        assert job.state == "completed", (job.error, self.said())
        return Image.open(self.store.files_of(job_id) / job.files[0])

    def text(self, timeout_s: float = 100) -> str:
        """The greedy text of `TEXT_PROMPT` over HTTP, once the server answers."""
        body = json.dumps({"prompt": TEXT_PROMPT, "max_tokens": 12, "temperature": 0}).encode()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            addresses = re.findall(r'"url": "([^"]+)"', self.said())
            request = urllib.request.Request(
                f"{addresses[-1] if addresses else 'http://127.0.0.1:1'}/v1/completions",
                body,
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                    return json.load(answer)["choices"][0]["text"]
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.said())

    def wait(self, what: Callable[[], Any], timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.logs.iterdir()))

    def everything(self) -> list[int]:
        """All processes of the server that live, by the data folder in their command lines."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and str(self.data).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """Return rank processes of torchrun: a fork of an agent has its command line and is its child."""
        known = self.everything()
        return [pid for pid in known if parent(parent(pid)) in {process.pid for process in self.processes}]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for pid in self.everything():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.store.close()


def parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def expected(**more: Any) -> Image.Image:
    from tests.support.real_omni import by_diffusers

    return by_diffusers("flux", 7, **{**CALL, **more})[0]


def equal(one: Image.Image, other: Image.Image) -> bool:
    return (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())
