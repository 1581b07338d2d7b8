"""A server in a process of its own, for `bench/serve.py`: started, asked over HTTP, looked at, killed in parts."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardit.engine.process.fork_client import FORK_SERVER

WAIT_S = 120.0


class Served:
    """`shardit serve` on a free port. `begun` is the monotonic time of its start."""

    def __init__(self, model: str, *flags: str):
        self._temporary = tempfile.TemporaryDirectory(prefix="shardit-bench-serve-")
        self.folder = Path(self._temporary.name) / "data"
        self._log = Path(self._temporary.name) / "log"
        self.begun = time.monotonic()
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "shardit", "serve", model, "--port", "0", "--data-dir", str(self.folder)]
            self._process = subprocess.Popen([*command, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.port = self.wait(self._find_port)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._temporary.cleanup()

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Until something holds; what it gives."""
        end = time.monotonic() + WAIT_S
        while not (found := condition()):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server does not do it:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.005)
        return found

    def connect(self) -> Connection:
        """A connection that is kept, as clients do."""
        return Connection(self.port)

    def answers(self, path: str) -> bool:
        """Whether `path` is answered by 200 now."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.connect().call("GET", path)[0] == 200
        return False

    def child(self, words: str) -> int:
        """The process of the server, or of its fork server, whose command line has these words; a rank for "rank"."""
        ours = children(self._process.pid)
        if words == "rank":
            return max(children(self.child(FORK_SERVER)))
        return next(pid for pid in ours if words in Path(f"/proc/{pid}/cmdline").read_text())

    def kill_a_rank(self) -> float:
        """The monotonic time at which the last rank was killed."""
        os.kill(self.child("rank"), signal.SIGKILL)
        return time.monotonic()

    def rss_mib(self, words: str) -> float:
        """Resident memory of one of its processes."""
        status = Path(f"/proc/{self.child(words)}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    def age_s(self, words: str) -> float:
        """Seconds since one of its processes was started."""
        ticks = int(Path(f"/proc/{self.child(words)}/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

    def _find_port(self) -> int | None:
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                said = json.loads(line)
                if said.get("event") == "serving":
                    return int(said["url"].rpartition(":")[2])
        return None


class Connection:
    """One client's connection."""

    def __init__(self, port: int):
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of one answer."""
        data = None if body is None else json.dumps(body).encode()
        self.http.request(method, path, data, {} if data is None else {"Content-Type": "application/json"})
        answer = self.http.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}

    def good(self, method: str, path: str, body: Any = None) -> tuple[bytes, dict[str, str]]:
        """As `call`; RuntimeError where it is not answered well."""
        status, content, headers = self.call(method, path, body)
        if status not in (200, 202):
            raise RuntimeError(f"{method} {path}: {status} {content[:500]!r}")
        return content, headers

    def events(self, path: str) -> Any:
        """Server-sent events as (name, data, monotonic time), until the answer ends."""
        self.http.request("GET", path)
        answer, name = self.http.getresponse(), ""
        while line := answer.readline():
            key, _, value = line.decode().rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                yield name, json.loads(value), time.monotonic()


def children(pid: int) -> list[int]:
    """Living children of a process, whichever of its threads has started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    found.append(int(entry.name))
    return found
