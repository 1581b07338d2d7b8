"""Starting ranks: from any kind of program, without its main module, leaving no process behind."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy
import pytest
from PIL import Image

from bench.served import children
from shardit.engine.process.channel import Channel
from shardit.engine.process.fork_client import ForkServerClient
from shardit.engine.process.process import started_by_torchrun, threads_per_rank
from tests.support.paths import SUPPORT

# No `if __name__ == "__main__"`: a rank that ran this again would start ranks of its own.
PREAMBLE = """
import json, os, sys
from shardit.config import DiffusionParallelConfig
from shardit.engine.omni import Omni
Omni._session = "fake_session:Session"
MARK = "only the user's main module has this"
def say(**values):
    print(json.dumps(values), flush=True)
def family(omni):
    return [omni._ranks.placement.fork_server.process.pid, *omni._ranks.placement.fork_server.pids]
def two(model="x", **options):
    return Omni(model, parallel_config=DiffusionParallelConfig(pipeline_parallel_size=2), **options)
"""
ONE_CALL = """
omni = two()
say(family=family(omni))
output = omni.generate("hello")[0]
say(prompt=output.prompt, peaks=len(output.peak_bytes), torch="torch" in sys.modules, **output.metrics)
"""


def environment() -> dict[str, str]:
    """The tests' folder is where the ranks find the stand-in session."""
    return {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}


def family(fork_server: int) -> list[int]:
    """A fork server, and the ranks that it has now."""
    return [fork_server, *children(fork_server)]


def living(family: list[int]) -> list[str]:
    """Return the command lines of a fork server, its ranks, and the processes in their groups; zombies left out."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            pid, (state, _, group) = int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if {pid, int(group)} & set(family) and state != "Z":
            found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes()!r}")
    return found


def assert_gone(family: list[int]) -> None:
    deadline = time.monotonic() + 5
    while left := living(family):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def run(*command: str, **options) -> tuple[dict, subprocess.CompletedProcess]:
    """Run a program to its end; returns its merged output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), **options)
    said: dict = {}
    for line in done.stdout.splitlines():
        said.update(json.loads(line))
    return said, done


def began(script: str) -> tuple[subprocess.Popen, dict]:
    """Start a program that goes on after its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


@pytest.mark.parametrize("kind", ["script", "command", "stdin"])
def test_runs_from_any_program_and_leaves_nothing(kind, tmp_path):
    source = PREAMBLE + ONE_CALL
    # Files in the working folder must not pose as modules of the ranks.
    (tmp_path / "selectors.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "shardit.py").write_text("raise SystemExit('the wrong module')")
    program = tmp_path / "elsewhere" / "program.py"
    program.parent.mkdir()
    program.write_text(source)
    if kind == "script":
        said, done = run(sys.executable, str(program), cwd=tmp_path)
    elif kind == "command":
        said, done = run(sys.executable, "-c", source)
    else:
        said, done = run(sys.executable, "-", input=source)
    assert done.returncode == 0, done.stderr
    assert said["prompt"] == "hello"
    assert said["peaks"] == 2
    assert said["torch"] is False
    assert "MARK" not in said["main"]
    assert "2/2" in done.stderr, "the progress bar"
    assert_gone(said["family"])


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken"])
def test_runs_with_closed_standard_streams(closed, taken, tmp_path):
    """taken: a file of the program has got the free descriptor, before there are ranks."""
    opened = "file = open('result', 'w')\n"
    source = [opened, PREAMBLE, ONE_CALL] if taken else [PREAMBLE, ONE_CALL, opened]
    (tmp_path / "program.py").write_text("".join([*source, "file.write(output.prompt)\n"]))
    done = run("sh", "-c", f"{sys.executable} program.py {closed}", cwd=tmp_path)[1]
    assert (done.returncode, (tmp_path / "result").read_text()) == (0, "hello"), done.stderr


def test_exception_leaves_nothing():
    said, done = run(sys.executable, "-c", PREAMBLE + ONE_CALL + "1 / 0")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert_gone(said["family"])


@pytest.mark.parametrize("how", ["os._exit(7)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)"])
def test_sudden_end_leaves_nothing(how):
    said, done = run(sys.executable, "-c", PREAMBLE + ONE_CALL + how)
    assert done.returncode != 0
    assert_gone(said["family"])


def test_killed_process_with_a_fork_holding_the_socket():
    fork = "pid = os.fork()\nif pid == 0:\n    import time; time.sleep(20); os._exit(0)\nsay(fork=pid)\nos._exit(0)\n"
    process, said = began(ONE_CALL + fork)
    assert process.stdout is not None
    rest = [json.loads(process.stdout.readline()) for _ in range(2)]
    try:
        assert_gone(said["family"])
    finally:
        os.kill(rest[-1]["fork"], signal.SIGKILL)
        process.communicate(timeout=10)


@pytest.mark.parametrize("moment", ["imports", "start", "generate", "stubborn"])
def test_killed_user_process_leaves_nothing(moment):
    generate = "omni = two()\nsay(family=family(omni))\nomni.generate({!r})"
    start = """
import threading, time
def tell():
    while not (found := children(os.getpid())):
        time.sleep(0.01)
    time.sleep(0.3)
    say(fork_server=int(found[0]))
from pathlib import Path
def children(pid):
    files = Path(f"/proc/{pid}/task").glob("*/children")  # of each thread
    return [word for file in files for word in file.read_text().split()]
threading.Thread(target=tell).start()
"""
    script = {
        "imports": start + "two('check.sleep:30')",
        "start": start + "two('start.sleep:30')",
        "generate": generate.format("sleep:30"),
        "stubborn": generate.format("stop:1 orphan:0 sleep:30"),
    }[moment]
    process, said = began(script)
    deadline = time.monotonic() + 10
    while True:
        members = said["family"] if "family" in said else family(said["fork_server"])
        if len(living(members)) >= (1 if moment == "imports" else 3):
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=10)
    assert_gone(members)


def test_interrupt_ends_ranks_and_the_next_generate_works():
    process, said = began(
        "omni = two()\nsay(family=family(omni))\n"
        "try:\n    omni.generate('sleep:30')\n"
        "except KeyboardInterrupt:\n    say(interrupted=True)\n"
        "say(again=omni.generate('hello')[0].prompt)\n"
    )
    time.sleep(0.5)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - begin < 5
    assert [json.loads(line) for line in out.splitlines()] == [{"interrupted": True}, {"again": "hello"}], err
    assert_gone(said["family"])


def test_interrupt_during_the_start():
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + "say(pid=os.getpid())\ntwo('start.sleep:30')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.6)
    (fork_server,) = children(process.pid)
    members = family(fork_server)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert b"KeyboardInterrupt" in err
    assert_gone(members)


def test_progress_can_be_turned_off():
    said, done = run(sys.executable, "-c", "import os; os.environ['SHARDIT_PROGRESS'] = '0'\n" + PREAMBLE + ONE_CALL)
    assert said["prompt"] == "hello"
    assert "2/2" not in done.stderr


def test_joins_under_torchrun(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        PREAMBLE.replace("fake_session", "fake_session_with_torch")
        + "omni = two()\noutputs = omni.generate(['a', 'b'])\n"
        + "assert len(outputs) == (2 if os.environ['RANK'] == '0' else 0)\n"
        + "try:\n    Omni('x')\nexcept Exception as error:\n    text = f'{type(error).__name__}: {error}'\n"
        # One write per rank: lines of two processes must not mix.
        + "os.write(1, (json.dumps({os.environ['RANK']: [[o.prompt, o.seed, o.metrics['pid'] == os.getpid()]"
        + " for o in outputs], 'error': text}) + '\\n').encode())\n"
    )
    said, done = run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program))
    assert done.returncode == 0, done.stderr
    assert [(prompt, same) for prompt, _, same in said["0"]] == [("a", True), ("b", True)]
    assert said["1"] == []
    assert said["error"].startswith("InputError")
    assert "2 ranks" in said["error"]
    assert "needs 1" in said["error"]


def test_ranks_have_a_group_and_agree():
    """With torch: the rendezvous works, threads come back after the fork, and a call leaves no torch here."""
    script = ONE_CALL.replace("two()", "two('torch')").replace("hello", "reduce")
    said, done = run(sys.executable, "-c", PREAMBLE.replace("fake_session", "fake_session_with_torch") + script)
    assert done.returncode == 0, done.stderr
    assert said["sum"] == 3.0
    assert said["torch_threads"] == 1
    assert_gone(said["family"])


def test_large_messages_are_quick():
    pixels = numpy.random.default_rng(0).integers(0, 255, (704, 1280, 3), dtype=numpy.uint8)
    pictures = [Image.fromarray(pixels) for _ in range(40)]
    pictures[0].info["seed"] = "7"
    ours, theirs = (Channel(end) for end in socket.socketpair())
    begin = time.monotonic()
    sender = threading.Thread(target=theirs.send, args=([pictures, pixels],))
    sender.start()
    got, array = ours.recv()
    sender.join()
    assert time.monotonic() - begin < 5  # 0.4 s on an idle machine
    assert numpy.array_equal(array, pixels)
    assert all(picture.tobytes() == pixels.tobytes() for picture in got)
    assert got[0].info == {"seed": "7"}
    got[0].putpixel((0, 0), (1, 2, 3))
    ours.close()
    theirs.close()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_pictures_of_every_mode_arrive(mode):
    ours, theirs = (Channel(end) for end in socket.socketpair())
    for size in ((5, 3), (0, 4)):
        picture = Image.new(mode, size)
        theirs.send(picture)
        got = ours.recv()
        assert (got.mode, got.size, got.tobytes()) == (picture.mode, picture.size, picture.tobytes())
    ours.close()
    theirs.close()


def test_threads_are_the_users_or_shared(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert threads_per_rank(2) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_per_rank(size) for size in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_torchrun_is_recognised_by_its_environment():
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    assert not started_by_torchrun({})
    assert not started_by_torchrun(one)
    assert started_by_torchrun({**one, "TORCHELASTIC_RUN_ID": "none"})
    assert started_by_torchrun({**one, "WORLD_SIZE": "2"})
    assert not started_by_torchrun({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_fork_server_whose_imports_hang_can_be_stopped(monkeypatch):
    monkeypatch.setattr(
        "shardit.engine.process.fork_client.STOP_TIMEOUT_S", 100.0
    )  # far longer than a busy machine takes
    fork_server = ForkServerClient(timeout_s=5)
    os.kill(fork_server.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    fork_server.stop()
    assert time.monotonic() - begin < 20
    assert_gone([fork_server.process.pid])
