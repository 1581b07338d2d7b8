"""The script of docs/add-a-model.md runs and prints the output in the page."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.paths import DOCS
from tests.support.ranks import run_ranks

PAGE = DOCS / "add-a-model.md"


def _run(script: str, folder: Path) -> list[tuple[int, int]]:
    """For each rank the messages and bytes that it printed, least first.

    torchrun starts ranks without buffers, so lines of two ranks mix on one pipe: each rank writes a file of its own.
    """
    (folder / "check.py").write_text(script, encoding="utf-8")
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--log-dir", str(logs), "--redirects", "3", "check.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    printed = [path.read_text("utf-8") for path in sorted(logs.rglob("stdout.log"))]
    errors = [path.read_text("utf-8")[-2000:] for path in sorted(logs.rglob("stderr.log"))]
    assert done.returncode == 0, errors or done.stderr[-2000:]
    return _numbers(printed)


def _numbers(printed: list[str]) -> list[tuple[int, int]]:
    return sorted((int(m), int(b)) for out in printed for m, b in re.findall(r"(\d+) messages, (\d+) bytes", out))


def _executed(rank: int, count: int, method: str, script: str, port: int) -> str:
    """Return the output of a rank in the environment of torchrun."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script, {"__name__": "__main__"})
    return printed.getvalue()


def test_the_script_of_the_page(tmp_path: Path) -> None:
    script = next(text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S) if "torch" in text)
    plain = _run(script, tmp_path)
    assert [messages for messages, _ in plain] == [2, 2]
    assert all(sent > 0 for _, sent in plain)
    ordered = script.replace("plan = None  # or ", "plan = ")
    assert ordered != script
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert [messages for messages, _ in _numbers(run_ranks(2, _executed, ordered, port))] == [1, 1]
