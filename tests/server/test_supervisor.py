"""A real server under attack: whatever process is killed or stopped, accepted jobs go on and give the same bits."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from shardit.models import tiny
from shardit.server.jobs.job import NewJob
from shardit.server.jobs.store import Store
from tests.support.light import LightCommands
from tests.support.real_omni import by_diffusers, same
from tests.support.real_server import WAIT_S, RealServer, alive, at, real_server

LONG = {"num_inference_steps": 40}
STAGES = ("--pipeline-parallel-size", "2")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with real_server("flux", tmp_path_factory.mktemp("shared") / "data", *STAGES, "--api-key", "a-secret") as server:
        yield server


@pytest.fixture
def server(shared: RealServer) -> RealServer:
    shared.wait_ready()
    return shared


def downs(server: RealServer) -> list[dict[str, Any]]:
    return server.events("ranks_down")


def test_ranks_come_before_http(server: RealServer) -> None:
    pids = server.pids()
    niceness = {name: os.getpriority(os.PRIO_PROCESS, pid) for name, pid in pids.items()}
    assert niceness.pop("api") == 5
    assert set(niceness.values()) == {0}
    if Path("/proc/self/autogroup").exists():  # Linux looks at niceness only within a session
        assert Path(f"/proc/{pids['api']}/autogroup").read_text().endswith(" nice 5\n")
        assert os.getsid(pids["api"]) == pids["api"]
    if sys.version_info >= (3, 11):  # threads that write results give way to ranks
        assert {os.getsid(pids[f"rank {rank}"]) for rank in (0, 1)} == {os.getsid(pids["supervisor"])}
    assert os.getpgid(pids["fork_server"]) == pids["fork_server"]


@pytest.mark.parametrize(
    "what",
    ["rank 1", pytest.param("rank 0", marks=pytest.mark.full), pytest.param("fork_server", marks=pytest.mark.full)],
)
def test_a_killed_rank_or_fork_server(server: RealServer, what: str) -> None:
    before, first = len(downs(server)), server.pids()
    jobs = {seed: server.submit(seed, **LONG) for seed in (1, 2)}
    server.stepping(jobs[1])
    killed = server.kill(what)
    line = server.wait(lambda: downs(server)[before:], "ranks_down")[0]
    assert at(line) - killed < 1.0
    if what != "fork_server":
        assert what in line["reason"]
    server.wait(lambda: server.call("GET", "/ready")[1]["restarts"] > before, "/ready tells of it", 10)
    for seed, job_id in jobs.items():
        server.check(job_id, seed, **LONG)
    assert server.begun(jobs[1]) == 2
    assert not any(alive(pid) for name, pid in first.items() if name.startswith("rank"))
    assert server.pids()["supervisor"] == first["supervisor"]
    assert server.pids()["api"] == first["api"]


def test_a_killed_api_process(server: RealServer) -> None:
    before = server.pids()
    job_id = server.submit(5, **LONG)
    server.stepping(job_id)
    server.kill("api")
    assert server.job(job_id)["status"] in ("in_progress", "completed")  # at the same address
    server.check(job_id, 5, **LONG)
    after = server.pids()
    assert after["api"] != before["api"]
    assert {name: pid for name, pid in after.items() if name != "api"} == {
        name: pid for name, pid in before.items() if name != "api"
    }
    assert server.begun(job_id) == 1


@pytest.mark.full
def test_a_stopped_api_process(server: RealServer) -> None:
    before = server.pids()
    job_id = server.submit(5, **LONG)
    server.stepping(job_id)
    server.kill("api", signal.SIGSTOP)
    server.wait(lambda: server.events("api_process_hangs"), "api_process_hangs", 90)
    server.check(job_id, 5, **LONG)  # at the same address
    assert server.pids()["api"] != before["api"]
    assert not alive(before["api"])
    assert server.begun(job_id) == 1


def test_neither_supervisor_nor_api_process_has_torch(server: RealServer) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system has no /proc")
    for what in ("supervisor", "api"):
        assert "torch" not in Path(f"/proc/{server.pids()[what]}/maps").read_text(), what


def test_pictures_by_openais_client(server: RealServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.api_key, timeout=WAIT_S, max_retries=0)
    own = {**tiny.defaults("flux"), "seed": 5}
    size = f"{own.pop('width')}x{own.pop('height')}"
    answer = client.images.generate(prompt="a cat", size=size, n=2, extra_body=own)
    made = [Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data or []]
    assert same(by_diffusers("flux", 5, prompt="a cat", num_images_per_prompt=2), made)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()


@pytest.mark.full
def test_cancel_one_of_several(server: RealServer) -> None:
    jobs = {seed: server.submit(seed, **LONG) for seed in (1, 2, 3)}
    server.stepping(jobs[1])
    status, _ = server.call("POST", f"{server.path}/{jobs[1]}/cancel")
    assert status == 200
    assert server.ended(jobs[1])["status"] == "cancelled"
    for seed in (2, 3):
        server.check(jobs[seed], seed, **LONG)


def test_a_second_server_on_the_same_folder_or_port(
    server: RealServer, commands: LightCommands, tmp_path: Path
) -> None:
    (line,) = rejection(commands, server.folder, server.model, "--port=0")
    assert "is used by another server; choose another with --data-dir" in line
    (line,) = rejection(commands, tmp_path, server.model, "--port", str(server.port))
    assert "cannot listen on" in line
    assert "--port" in line


def rejection(commands: LightCommands, folder: Path, *arguments: str) -> list[str]:
    """Return the output, but for its log, of a server with its data in `folder`; it exits with code 2, and has not
    imported torch."""
    done = commands.run(["serve", *arguments, f"--data-dir={folder}"], folder)
    assert done.returncode == 2, done
    assert done.stdout == ""
    return [line for line in done.stderr.splitlines() if not line.startswith("{")]


def test_a_killed_supervisor_then_a_regular_exit(shared: RealServer) -> None:
    """The last test of the shared server: SIGKILL, the same command again, SIGTERM, and the same command again."""
    server = shared
    server.wait_ready()
    jobs = {seed: server.submit(seed, **LONG) for seed in (1, 2, 5)}
    server.stepping(jobs[1])
    pids = server.pids()
    assert set(pids) == {"supervisor", "api", "fork_server", "rank 0", "rank 1"}
    server.kill("supervisor")
    assert server.process is not None
    server.process.wait(10)
    server.start()  # at once, and on the same port
    assert server.events("serving")[0]["jobs_to_repeat"] >= 1
    deadline = time.monotonic() + 5
    while any(map(alive, pids.values())):
        assert time.monotonic() < deadline, {name: pid for name, pid in pids.items() if alive(pid)}
        time.sleep(0.05)
    server.check(jobs[1], 1, **LONG)
    server.wait_ready()
    more = [server.submit(seed, **LONG) for seed in (1, 2, 5)]
    server.stepping(more[0])
    pids = server.pids()
    begin = time.monotonic()
    assert server.stop(timeout_s=30) == 0
    assert time.monotonic() - begin < 10
    assert not any(map(alive, pids.values()))
    ask_without_key(server)
    server.start()
    assert server.events("serving")[0]["jobs_to_repeat"] >= 1  # it had put them back
    (line,) = server.wait(lambda: server.events("hidden_jobs"), "hidden_jobs")
    assert line["jobs"] == 1
    assert "start without keys" in line["reason"]
    for seed, job_id in zip((1, 2, 5), more, strict=True):
        server.check(job_id, seed, **LONG)
    for seed, job_id in jobs.items():
        server.check(job_id, seed, **LONG)
    assert_one_end(server)


def ask_without_key(server: RealServer) -> None:
    """Leave three jobs in the store, two of them without an owner, one of which is cancelled."""
    store = Store(server.folder)
    for owner in (None, None, "somebody"):
        job = NewJob("image", {**tiny.defaults("flux"), "prompt": "a"}, seed=1, cost=1.0, owner=owner)
        store.accept(job, queue_size=9)
    store.request_cancel(next(job.id for job in store.queued() if job.owner is None))
    store.close()


def assert_one_end(server: RealServer) -> None:
    ends = [line["request_id"] for line in server.events("job_ended", whole=True)]
    assert len(set(ends)) == len(ends)


# Each of these starts servers of its own.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny/nothing-of-this-name"], "no tiny model 'nothing-of-this-name'"),
        (["/no/such/folder"], "/no/such/folder"),
        (["tiny/flux", "--pipeline-parallel-size", "50"], "more than the 12 blocks"),
        (["tiny/flux", "--port", "99999"], "--port must be from 0 to 65535"),
    ],
)
@pytest.mark.full
def test_mistakes_are_one_line(commands: LightCommands, tmp_path: Path, arguments: list[str], words: str) -> None:
    (line,) = rejection(commands, tmp_path, *arguments, *(["--port", "0"] if len(arguments) < 3 else []))
    assert words in line


def test_jobs_that_wait_for_another_model(commands: LightCommands, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.accept(NewJob("image", {"prompt": "a cat"}, 1, 1.0), queue_size=1)
    store.remember("model", "tiny/qwen-image")
    store.close()
    (line,) = rejection(commands, tmp_path, "tiny/flux", "--port=0")
    assert "holds 1 unfinished job of tiny/qwen-image; serve that, or choose another folder with --data-dir" in line
    (line,) = rejection(commands, tmp_path, "tiny/qwen-image", "--port=0", "--vae-tiling")
    assert "job of tiny/qwen-image as served with no options of the model, now it is vae_tiling=True; serve it" in line
    store = Store(tmp_path)
    store.remember("model", "tiny/qwen-image with vae_tiling=True")
    store.close()
    (line,) = rejection(commands, tmp_path, "tiny/qwen-image", "--port=0")
    assert "of tiny/qwen-image as served with vae_tiling=True, now it is none; serve it as before" in line
    flags = ("--port", "0", "--vae-tiling", "--dtype", "bfloat16")
    (line,) = rejection(commands, tmp_path, "tiny/qwen-image", *flags)
    assert "as served with vae_tiling=True, now it is vae_tiling=True, dtype bfloat16; serve it as before" in line


def test_jobs_that_will_not_run_bind_to_no_model(commands: LightCommands, tmp_path: Path) -> None:
    # A client waited for it on a connection, another job was being cancelled, and texts nobody can ask for again.
    store = Store(tmp_path)
    for number, (kind, waits) in enumerate((("image", True), ("image", False), ("text", False))):
        store.accept(NewJob(kind, {"prompt": "a cat"}, number, 1.0, waits=waits), queue_size=9)
    cancelled = store.queued()[1].id
    store.start(cancelled)
    store.request_cancel(cancelled)
    assert (store.to_run(), store.to_repeat(), store.without_owner()) == (0, 0, 0)
    store.accept(NewJob("image", {"prompt": "a cat"}, 9, 1.0), queue_size=9)
    store.remember("model", "tiny/qwen-image")
    store.close()
    (line,) = rejection(commands, tmp_path, "tiny/flux", "--port=0")
    assert "holds 1 unfinished job of tiny/qwen-image" in line


@pytest.mark.full
def test_replicas_share_a_queue(tmp_path: Path) -> None:
    with real_server("flux", tmp_path / "data", "--data-parallel-size", "2", "--max-in-flight", "1") as server:
        jobs = {seed: server.submit(seed, **LONG) for seed in range(4)}
        server.wait(lambda: len(server.events("job_started")) >= 2, "two at a time")
        assert not server.events("job_ended")
        for seed, job_id in jobs.items():
            server.check(job_id, seed, **LONG)


@pytest.mark.full
def test_a_port_that_is_taken_by_others(commands: LightCommands, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (line,) = rejection(commands, tmp_path, "tiny/flux", "--port", str(other.getsockname()[1]))
    assert "cannot listen on" in line


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_a_hang(tmp_path: Path, rank: int) -> None:
    with real_server("flux", tmp_path / "data", *STAGES, "--step-timeout", "20") as server:
        server.check(server.submit(1), 1)
        job_id = server.submit(2, **LONG)
        server.stepping(job_id)
        stopped = server.pids()[f"rank {rank}"]
        server.kill(f"rank {rank}", signal.SIGSTOP)
        line = server.wait(lambda: downs(server), "ranks_down", 90)[0]
        assert "no progress" in line["reason"]
        assert f"rank {rank}: it does not react" in line["reason"]
        server.check(job_id, 2, **LONG)
        assert not alive(stopped)
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 10


@pytest.mark.full
def test_a_stopped_rank_dies_with_the_supervisor(tmp_path: Path) -> None:
    with real_server("flux", tmp_path / "data", *STAGES) as server:
        pids = server.pids()
        server.kill("rank 1", signal.SIGSTOP)
        server.kill("api", signal.SIGSTOP)
        server.kill("supervisor")
        deadline = time.monotonic() + 5
        while any(map(alive, pids.values())):
            assert time.monotonic() < deadline, {name: pid for name, pid in pids.items() if alive(pid)}
            time.sleep(0.05)


@pytest.mark.full
def test_exit_with_stopped_processes_and_of_all_at_once(tmp_path: Path) -> None:
    with real_server("flux", tmp_path / "data", *STAGES) as server:
        jobs = {seed: server.submit(seed, **LONG) for seed in (1, 2, 5)}
        server.stepping(jobs[1])
        pids = server.pids()
        for what in ("api", "rank 1", "fork_server"):
            server.kill(what, signal.SIGSTOP)
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 10
        assert not any(map(alive, pids.values()))
        server.start()
        assert server.events("serving")[0]["jobs_to_repeat"] >= 1
        server.stepping(jobs[1], 2)
        pids = server.pids()
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        assert server.process is not None
        server.process.wait(10)
        server.start()
        for seed, job_id in jobs.items():
            server.check(job_id, seed, **LONG)
        assert_one_end(server)


@pytest.mark.full
def test_a_job_that_kills_its_rank_fails_and_the_others_complete(tmp_path: Path) -> None:
    with real_server("flux", tmp_path / "data", *STAGES, faulty=True) as server:
        poison = server.submit(1, "a cat kill:1:2")
        others = {seed: server.submit(seed) for seed in range(2, 7)}
        shown = server.ended(poison)
        assert shown["error"]["code"] == "ranks_died"
        assert 3 <= server.begun(poison) <= 5
        for seed, job_id in others.items():
            server.check(job_id, seed)
        assert_one_end(server)


@pytest.mark.full
def test_a_rank_that_fails_alone_is_noticed_long_before_the_timeout(tmp_path: Path) -> None:
    with real_server("flux", tmp_path / "data", *STAGES, "--step-timeout", "500", faulty=True) as server:
        bad, good = server.submit(1, "a cat raise:1:2"), server.submit(2)
        shown = server.ended(bad)
        assert shown["error"]["code"] == "ranks_died"
        assert "alone ended a request: KeyError: 'on one rank only'" in shown["error"]["message"]
        server.check(good, 2)
        assert_one_end(server)


@pytest.mark.full
def test_out_of_memory_fails_that_job_only(tmp_path: Path) -> None:
    with real_server("flux", tmp_path / "data", *STAGES, faulty=True) as server:
        large = server.submit(1, "a cat oom:1:2")
        others = {seed: server.submit(seed) for seed in range(2, 7)}
        shown = server.ended(large)
        assert shown["error"]["code"] == "out_of_memory"
        assert "width=160, height=128" in shown["error"]["message"]
        for seed, job_id in others.items():
            server.check(job_id, seed)
        assert server.begun(large) <= 3
        assert_one_end(server)


@pytest.mark.full
def test_a_model_folder_that_breaks_and_comes_back(tmp_path: Path) -> None:
    model = tiny.write("flux", tmp_path / "model")
    server = RealServer(str(model), tmp_path / "data", *STAGES)
    try:
        server.start()
        server.wait_ready()
        model.rename(tmp_path / "away")
        server.kill("rank 1")
        server.wait(lambda: len(downs(server)) >= 3, "three failures")
        times = [at(line) for line in downs(server)]
        assert times[2] - times[1] > 0.9  # a pause, which grows
        status, said = server.call("GET", "/ready")
        assert status == 503
        assert said["state"] == "restarting"
        assert said["reason"]
        assert server.call("GET", "/health")[0] == 200
        shutil.move(tmp_path / "away", model)
        server.wait_ready()
        assert server.stop() == 0
    finally:
        server.end()


@pytest.mark.full
def test_sigterm_and_ctrl_c_while_the_ranks_load(tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        for pause in (0.0, 2.0):
            server = RealServer("tiny/flux", tmp_path / "data", *STAGES)
            server.start()
            time.sleep(pause)
            pids = server.pids()
            begin = time.monotonic()
            assert server.stop(number) == code
            assert time.monotonic() - begin < 10
            assert not any(map(alive, pids.values()))


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with real_server("flux", tmp_path / "data", *STAGES) as server:
        server.kill("fork_server")
        server.wait(lambda: downs(server), "ranks_down")
        server.wait_ready()
        assert server.stop() == 0
    assert [path.name for path in temporary.iterdir() if path.name.startswith("shardit-")] == []
