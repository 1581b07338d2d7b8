"""The end of the supervisor where something does not want to end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

STUCK_WRITER = """
import sys, threading, time
from pathlib import Path
from shardit.server.options import ServeOptions
from shardit.server.serve import serve
from shardit.server.supervisor import Supervisor

class Nowhere:
    def start(self, spec): time.sleep(100); return []
    def kill(self): return {}
    def stop(self, *_): pass
    def stacks(self): return {}

run = Supervisor.run

def patched(self):
    self.jobs.writing["image_x"] = self.writers.submit(time.sleep, 100)
    threading.Timer(0.5, lambda: self.loop.call(self.stop, 15)).start()
    return run(self)

Supervisor.run = patched
sys.exit(serve(ServeOptions("tiny/flux", Path(sys.argv[1]), port=0), Nowhere()))
"""


def test_a_result_that_is_written_for_ever_does_not_hold_up_the_end(tmp_path: Path) -> None:
    since = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", STUCK_WRITER, str(tmp_path)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert "results_not_written" in done.stderr
    assert time.monotonic() - since < 60
