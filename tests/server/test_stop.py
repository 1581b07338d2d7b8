"""The end of the supervisor where something does not want to end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardit.server.jobs.job import NewJob
from shardit.server.jobs.store import Store

SERVE = """
import os, signal, sqlite3, sys, threading, time
from pathlib import Path
from shardit.server.process import forced_exit
from shardit.server.options import ServeOptions
from shardit.server.entry.serve import serve
from shardit.server.supervisor.supervisor import Supervisor

class Nowhere:
    def start(self, spec): time.sleep(100); return []
    def kill(self): return {}
    def stop(self, *_): pass
    def stacks(self): return {}

run, placement, folder = Supervisor.run, Nowhere(), Path(sys.argv[1])

def patched(self):
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    prepare(self)
    return run(self)

Supervisor.run = patched
"""

STUCK_WRITER = """
def prepare(self):
    self.jobs.finisher.writing["image_x"] = self.writers.submit(time.sleep, 100)
"""

STUCK_LOOP = """
forced_exit.EXIT_TIMEOUT_S = 2.0
def prepare(self):
    self.loop.call(time.sleep, 100)
"""

STUCK_RANKS = """
forced_exit.EXIT_TIMEOUT_S = 2.0
def prepare(self):
    placement.stop = lambda *_: time.sleep(100)
"""

# Ranks take their time to end; meanwhile somebody asks again, in both ways.
ASKED_AGAIN = """
def prepare(self):
    placement.stop = lambda *_: time.sleep(2.5)
    for wait, number in ((2.5, signal.SIGTERM), (3.0, signal.SIGINT), (3.3, signal.SIGTERM)):
        threading.Timer(wait, os.kill, (os.getpid(), number)).start()
"""

# As by an API process that was stopped in the middle of a transaction.
STUCK_STORE = """
forced_exit.EXIT_TIMEOUT_S = 2.0
def prepare(self):
    db = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None, check_same_thread=False)
    threading.Timer(0.5, lambda: db.execute("BEGIN IMMEDIATE")).start()
    threading.Timer(1.0, lambda: self.loop.call(self.store.remember, "x", 1)).start()
"""

STUCK_LOG = """
forced_exit.EXIT_TIMEOUT_S = 2.0
def prepare(self):
    reads, writes = os.pipe()
    os.dup2(writes, 2)
    self.loop.call(os.write, 2, b"x" * 10**6)
"""


def end_of(prepare: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = f"{SERVE}{prepare}\nsys.exit(serve(ServeOptions('tiny/flux', folder, port=0), placement))"
    since = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - since < 60
    return done


def test_endless_write_does_not_block_the_exit(tmp_path: Path) -> None:
    assert "results_not_written" in end_of(STUCK_WRITER, tmp_path).stderr


@pytest.mark.parametrize("stuck", [STUCK_LOOP, STUCK_RANKS, STUCK_STORE])
def test_forced_exit_of_a_stuck_process(tmp_path: Path, stuck: str) -> None:
    store = Store(tmp_path)
    job = store.accept(NewJob("image", {"prompt": "a cat"}, 1, 1.0), queue_size=1)[0]
    assert "forced_exit" in end_of(stuck, tmp_path).stderr
    assert store.queued() == [job]
    store.close()


def test_unread_log_does_not_block_the_exit(tmp_path: Path) -> None:
    end_of(STUCK_LOG, tmp_path)


def test_second_signal_changes_nothing(tmp_path: Path) -> None:
    said = end_of(ASKED_AGAIN, tmp_path).stderr
    assert said.count("stopping") == 1, said
    assert "Traceback" not in said
    assert "wakeup fd" not in said
