"""Starts processes of shardit, ties them to their parent, and describes their exits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shardit
from shardit.settings.environment import threads_asked

PR_SET_PDEATHSIG = 1
_NICENESS = 10
"""A tenth of the usual share of a contended processor."""
_SESSION_NICENESS = 5
"""A quarter of a processor: at a tenth, answers to HTTP take longer than clients like."""
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
"""For `Popen`: signals of the terminal reach only the parent, which then decides. A session of its own would keep them
away, too, but Linux shares processors equally between sessions: thread priorities count only within theirs."""

# "-c" puts the working folder at the front of sys.path, where a file of the user's could pose as a module of ours. Only
# shardit itself is imported from the path of this process.
_BOOT = """
import gc, sys
if sys.argv[3] == "no_gc": gc.disable()
if not getattr(sys.flags, "safe_path", False): del sys.path[0]
sys.path.insert(0, sys.argv[1])
import importlib, shardit
if sys.path.pop(0) not in sys.path: sys.path.append(sys.argv[1])
sys.exit(importlib.import_module(sys.argv[2]).main(*map(int, sys.argv[4:])))
"""


def command(module: str, *numbers: int, no_gc: bool = False) -> list[str]:
    """Return the command line that runs `main(*numbers)` of a module and exits with its return value.

    no_gc: start with the garbage collector off, which would scan the results of imports repeatedly; `main` enables it
    after the imports.
    """
    root = str(Path(shardit.__file__).resolve().parents[1])
    return [sys.executable, "-c", _BOOT, root, module, "no_gc" if no_gc else "", *map(str, numbers)]


def hold_standard_descriptors() -> None:
    """Connect closed standard streams (`>&-`) to nothing, so that no socket gets their descriptors: child processes and
    libraries in C would write their output to it."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)


def inherited(descriptor: int) -> int | None:
    """Return what `Popen` takes for a standard stream: None where a child process would get that of this process, else
    a replacement. It is missing if it was closed, or if its descriptor is that of another file."""
    return None if os.get_inheritable(descriptor) else subprocess.DEVNULL


def die_with_parent(number: int) -> None:
    """Ask the kernel to send signal `number` to this process when its parent ends (0: no signal). Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def describe_exit(code: int) -> str:
    """Describe the exit of a process from its return code as `subprocess` counts it."""
    if code >= 0:
        return f"exited with code {code}"
    name = str(-code)
    with contextlib.suppress(ValueError):
        name = f"{-code} ({signal.Signals(-code).name})"
    return f"killed by signal {name}" + ("; out of memory?" if -code == signal.SIGKILL else "")


def started_by_torchrun(environ: Mapping[str, str]) -> bool:
    """Return whether this process is one of several ranks started by a launcher."""
    if not all(environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return False
    return environ["WORLD_SIZE"] != "1" or "TORCHELASTIC_RUN_ID" in environ


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Return whether this process is rank 0, or not one of several."""
    # RANK alone may be left over from another program; torchrun sets both.
    return environ.get("RANK", "0") == "0" or environ.get("WORLD_SIZE", "1") == "1"


def lower_priority(niceness: int = _NICENESS) -> None:
    """Give ranks priority over this thread, and over threads that it starts, if processors are short. Linux only:
    elsewhere priority belongs to processes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def lower_session_priority() -> None:
    """Lower the priority of a process that leads a session of its own, as `lower_priority` does. If Linux has
    autogroups, niceness of a thread counts only within its session: sessions share processors equally unless they have
    a niceness (man 7 sched)."""
    lower_priority(_SESSION_NICENESS)
    for _ in range(10):
        try:
            Path("/proc/self/autogroup").write_text(str(_SESSION_NICENESS))
        except BlockingIOError:  # users may do it ten times a second, all of them together
            time.sleep(0.1)
        except OSError:  # not Linux, or without autogroups
            return
        else:
            return


def threads_per_rank(world_size: int) -> int:
    """Return OMP_NUM_THREADS if the user has set it, else an equal share of the cores. Raises InputError for a wrong
    value."""
    if (wish := threads_asked(os.environ)) is not None:
        return wish
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world_size)


def set_threads(threads: int) -> None:
    """Undo the fork server's limit of one thread."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
