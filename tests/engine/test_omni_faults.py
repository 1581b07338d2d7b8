"""Ranks that die, hang, raise or refuse: the call ends in time with the right error, and the next one works."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardit.config import DiffusionParallelConfig
from shardit.engine.omni import Omni
from shardit.engine.process.failure import Timeouts
from shardit.errors import InputError, RankError, UnsupportedError
from tests.engine.test_launch import assert_gone, living
from tests.support.paths import SUPPORT


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(Omni, "_session", "fake_session:Session")
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.setattr(Omni, "_timeouts", Timeouts(peer_s=1.5))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make(model: str = "x", ranks: int = 2, **options) -> Omni:
    return Omni(model, parallel_config=DiffusionParallelConfig(pipeline_parallel_size=ranks), **options)


@pytest.fixture
def omni():
    with make() as omni:
        yield omni
        assert_works(omni)
    assert_gone(family_of(omni))


def fork_server_of(omni: Omni):
    return omni._ranks.placement.fork_server  # type: ignore[union-attr]


def family_of(omni: Omni) -> list[int]:
    return [fork_server_of(omni).process.pid, *fork_server_of(omni).pids]


def assert_works(omni: Omni) -> None:
    begin = time.monotonic()
    assert [output.prompt for output in omni.generate(["one", "two"])] == ["one", "two"]
    assert time.monotonic() - begin < 5


def failure(omni: Omni, prompt: str) -> RankError:
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        omni.generate(prompt)
    assert time.monotonic() - begin < 10
    return caught.value


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_from_outside_during_generate(omni, rank):
    pid = fork_server_of(omni).pids[rank]
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    error = failure(omni, "sleep:30")
    assert error.rank == rank
    assert error.reason == "killed by signal 9 (SIGKILL); out of memory?"


@pytest.mark.parametrize("wait", [0, 0.3])
def test_idle_rank_killed(omni, wait):
    os.kill(fork_server_of(omni).pids[1], signal.SIGKILL)
    time.sleep(wait)
    error = failure(omni, "hello")
    assert error.rank == 1
    assert "SIGKILL" in error.reason


def test_all_ranks_killed(omni):
    for pid in fork_server_of(omni).pids:
        os.kill(pid, signal.SIGKILL)
    assert "SIGKILL" in failure(omni, "hello").reason


def test_rank_killed_during_the_start():
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        make("start.kill:1 start.hang:0")
    assert caught.value.rank == 1
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.02, 0.05])
def test_rank_killed_during_a_restart(omni, moment):
    omni._ranks._end_ranks()
    first = fork_server_of(omni).pids

    def kill_when_it_is_there():
        while fork_server_of(omni).pids == first:
            time.sleep(0.001)
        time.sleep(moment)
        os.kill(fork_server_of(omni).pids[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_when_it_is_there)
    killer.start()
    error = failure(omni, "sleep:3")
    killer.join()
    assert error.rank == 1


def test_fork_server_killed(omni):
    fork_server = fork_server_of(omni)
    threading.Timer(0.3, fork_server.process.kill).start()
    error = failure(omni, "sleep:30")
    assert error.rank == -1
    assert "SIGKILL" in error.reason
    assert_gone([fork_server.process.pid, *fork_server.pids])


def test_exception_on_one_rank_while_another_waits(omni):
    error = failure(omni, "fail:1 hang:0")
    assert error.rank == 1
    assert error.reason.startswith("KeyError: 'no such block'\nTraceback")
    assert "fake_session.py" in error.reason


def test_root_failure_is_named(omni):
    assert failure(omni, "peer:0 fail:1").rank == 1
    assert failure(omni, "peer:1 sleep:0.2 kill:0").rank == 0
    assert failure(omni, "abort:0 fail:1").rank == 1


@pytest.mark.parametrize(("deed", "words"), [("abort", "SIGABRT"), ("exit", "exited with code 3")])
def test_other_ends(omni, deed, words):
    error = failure(omni, f"{deed}:1 hang:0")
    assert error.rank == 1
    assert words in error.reason


@pytest.mark.parametrize(("deed", "words"), [("hang", "in hang"), ("stop", "does not react")])
def test_hang_past_the_timeout(deed, words):
    with make(timeout_s=1.0) as omni:
        error = failure(omni, f"{deed}:1")
        assert error.rank == 1
        assert "no progress for 1 s" in error.reason
        assert "fake_session.py" in error.reason or deed == "stop"
        assert words in error.reason
        assert_works(omni)


def test_peers_give_up_on_a_rank_that_hangs(omni):
    error = failure(omni, "peer:0 hang:1")
    assert error.rank == 1
    assert "it hangs" in error.reason


def test_progress_puts_the_timeout_off():
    with make(timeout_s=1.0) as omni:
        outputs = omni.generate(["sleep:0.6", "sleep:0.6", "sleep:0.6"], num_inference_steps=1)
        assert len(outputs) == 3


def test_hang_during_the_start():
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        make("start.hang:1", timeout_s=1.0)
    assert caught.value.rank == 1
    assert time.monotonic() - begin < 5


def test_hang_before_the_start(monkeypatch):
    monkeypatch.setattr("shardit.engine.process.fork_client.IMPORT_TIMEOUT_S", 1.0)
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"did not answer in time: raise timeout_s \(--timeout\), which is 1 s"):
        make("check.sleep:30", timeout_s=1.0)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("check.refuse", InputError),
        ("check.unsupported", UnsupportedError),
        ("start.refuse", InputError),
        ("start.refuse:1 start.hang:0", InputError),
        ("start.unsupported:0 start.peer:1", UnsupportedError),
    ],
)
def test_input_errors_of_the_start_arrive_typed(model, kind):
    with pytest.raises(InputError) as caught:
        make(model)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_error_in_the_check_is_a_rank_error():
    with pytest.raises(RankError, match="no such block"):
        make("check.fail")


def test_input_error_of_all_ranks_keeps_them(omni):
    pids = fork_server_of(omni).pids
    with pytest.raises(InputError, match="more stages"):
        omni.generate("refuse")
    assert_works(omni)
    assert fork_server_of(omni).pids == pids


def test_input_error_of_one_rank_restarts_the_ranks(omni):
    pids = fork_server_of(omni).pids
    with pytest.raises(InputError, match="more stages"):
        omni.generate("refuse:1 hang:0")
    assert_works(omni)
    assert fork_server_of(omni).pids != pids


class Unknown:
    """Can be pickled, but not unpickled."""

    def __reduce__(self):
        return (int, ("no number",))


def test_objects_that_cannot_travel(omni):
    with pytest.raises(InputError, match="cannot be sent"):
        omni.generate("hello", note=threading.Lock())
    with pytest.raises(InputError, match="cannot load"):
        omni.generate("hello", note=Unknown())


def test_two_at_once():
    with make() as one, make() as other, ThreadPoolExecutor() as pool:
        sleeps = [pool.submit(each.generate, "sleep:1") for each in (one, other)]
        outputs = [sleep.result()[0] for sleep in sleeps]
        assert all(output.prompt == "sleep:1" for output in outputs)
        begins, ends = zip(*(output.metrics["span"] for output in outputs), strict=True)
        assert max(begins) < min(ends)
        assert failure(one, "kill:0").rank == 0
        assert_works(other)
    assert not living(family_of(one))


def test_calls_from_several_threads_take_turns(omni):
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(omni.generate, f"sleep:0.1 {index}") for index in range(4)]
        assert [call.result()[0].prompt for call in calls] == [f"sleep:0.1 {index}" for index in range(4)]


def test_made_in_a_thread_that_ends():
    with ThreadPoolExecutor(1) as pool:
        omni = pool.submit(make).result()
    time.sleep(0.1)
    with omni:
        assert_works(omni)


def test_close():
    omni = make()
    threading.Timer(0.3, omni.close).start()
    with pytest.raises(InputError, match="close\(\) was called while a call waited"):
        omni.generate("sleep:30")
    omni.close()
    with pytest.raises(InputError, match="closed"):
        omni.generate("hello")
    assert_gone(family_of(omni))


def test_forgotten_omni_ends():
    omni = make()
    family, folder = family_of(omni), fork_server_of(omni).directory
    assert os.path.isdir(folder)
    del omni
    assert_gone(family)
    assert not os.path.exists(folder)


def test_fork_of_the_user_process_ends_nothing(omni):
    pid = os.fork()
    if pid == 0:
        omni.close()
        os._exit(0)
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "model must be"),
        ({"model": 3}, "model must be"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "DiffusionParallelConfig"),
        ({"dtype": 16}, "dtype '16' is not known"),
        ({"device": 0}, "device must be"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"max_in_flight": True}, "max_in_flight"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "10"}, "timeout_s"),
        ({"timeout_s": 1e9}, "timeout_s"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(InputError, match=words):
        Omni(**{"model": "x", **options})
