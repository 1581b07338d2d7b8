"""`shardit train` under torchrun: the ranks are there already."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from shardit.training.run.checkpoint import find
from tests.support.paths import ROOT
from tests.training.run.runs import rows


def start(output: Path, model: str) -> subprocess.Popen[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, *ranks, "-m", "tests.training.run.joined", str(output), model]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def steps(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(rows(output)) if file.exists() else 0


def test_ctrl_c_and_a_dead_rank_under_torchrun(tmp_path: Path) -> None:
    stopped, dead = tmp_path / "stopped", tmp_path / "dead"
    processes = start(stopped, "toy slow:0.1"), start(dead, "toy kill:1:3")
    try:
        deadline = time.monotonic() + 60
        while steps(stopped) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(processes[0].pid, signal.SIGINT)  # as a terminal does: to torchrun and to the ranks
        out, err = processes[0].communicate(timeout=40)
        (checkpoint,) = find(stopped)
        assert 3 <= checkpoint.step < 30
        assert f"the run stopped after step {checkpoint.step}; --resume goes on" in out, err
        assert len(rows(stopped)) == checkpoint.step
        begin = time.monotonic()
        _, err = processes[1].communicate(timeout=40)
        assert processes[1].returncode != 0
        assert "Signal 9 (SIGKILL)" in err or "exitcode  : -9" in err or "-9" in err
        assert time.monotonic() - begin < 20
        assert [row["step"] for row in rows(dead)] == [1, 2]
    finally:
        for one in processes:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
                one.communicate()
