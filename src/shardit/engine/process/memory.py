"""Measures the memory of a rank: now in use, peak, and limit."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path


def reset_peak() -> None:
    """Restart the measurement of `peak_bytes`."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of resident memory


def peak_bytes() -> int:
    """Return the peak of memory since `reset_peak`: of the accelerator if one is used, else resident memory.

    If the system cannot reset its mark, the peak counts from the start of the process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if (peak := _of_status("VmHWM")) is not None:
        return peak
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def held_bytes() -> int:
    """Return the memory now in use, counted as `peak_bytes` counts it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    held = _of_status("VmRSS")
    return peak_bytes() if held is None else held


def limit_bytes(ranks_here: int) -> int | None:
    """Return the memory limit of this rank, None if it is not known: its accelerator's memory, or an equal share of
    this machine's (or container's) for each of `ranks_here` ranks."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.mem_get_info()[1]
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole // ranks_here


def _of_status(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
