"""What is written down of the machine, and how much of it others use meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

QUIET = 0.03
"""Share of all cores that others may use while something is timed."""


def describe(command: list[str]) -> dict[str, Any]:
    """Everything a reader needs to repeat a measurement."""
    return {
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions("torch", "diffusers", "transformers", "shardit", "xfuser", "yunchang", "vllm-omni"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench", *command]),
        "load_before": list(os.getloadavg()),
    }


def _versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed: the last ones are measured next to shardit, and are no dependencies."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The short commit of the working tree, "+changes" where it differs, "unknown" outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short=10", "HEAD")
    return (name + ("+changes" if git("status", "--porcelain", "--", "../src") else "")) if name else "unknown"


def short_name() -> str:
    """The CPU and its cores as part of a file name."""
    words = "".join(c if c.isalnum() else "-" for c in _cpu_model().lower()).strip("-")
    return f"{words or platform.machine()}-{os.cpu_count()}-cores"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used so far, and those a hypervisor took away."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = _processor_seconds()
    return user + nice + system + irq + softirq + steal


def stolen_seconds() -> float:
    """CPU seconds that a hypervisor has given to other guests so far, while ours wanted them."""
    return _processor_seconds()[-1]


def _processor_seconds() -> list[float]:
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        return [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
    except (OSError, ValueError):
        return [0.0] * 8


def share_of_others(wall_s: float, busy_s: float, own_s: float) -> float:
    """Share of all cores that others used in a time of `wall_s` in which we used `own_s`."""
    return max(0.0, busy_s - own_s) / (wall_s * (os.cpu_count() or 1))


def wait_until_quiet(limit_s: float) -> bool:
    """Wait until nobody uses the machine for half a second; False where that did not happen in time."""
    end = time.monotonic() + limit_s
    while True:
        busy, start = busy_seconds(), time.monotonic()
        time.sleep(0.5)
        if share_of_others(time.monotonic() - start, busy_seconds() - busy, 0.0) <= QUIET:
            return True
        if time.monotonic() > end:
            return False
