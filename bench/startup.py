"""Time until `Omni` on two ranks is ready, against the imports alone in as many processes at once."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median
from typing import Any

RANKS = 2
_OMNI = """
from shardit import DiffusionParallelConfig, Omni
omni = Omni("tiny/wan2.2-t2v", parallel_config=DiffusionParallelConfig(pipeline_parallel_size=2), device="cpu")
print("ready", flush=True)
omni.close()
"""
_IMPORTS = 'import torch, diffusers; print("ready", flush=True)'


def measure(runs: int) -> dict[str, Any]:
    """Medians of `runs` interleaved runs; both clocks start before the interpreters do."""
    _ready(_OMNI, 1)  # writes the checkpoint, warms the disk
    imports, omni = [], []
    for _ in range(runs):
        imports.append(_ready(_IMPORTS, RANKS))
        omni.append(_ready(_OMNI, 1))
    return {
        "runs": runs,
        "imports_s": median(imports),
        "omni_s": median(omni),
        "beyond_imports_s": median(omni) - median(imports),
        "all": {"imports_s": imports, "omni_s": omni},
    }


def _ready(code: str, count: int) -> float:
    """Seconds until `count` interpreters that run the code at once have all said so."""
    start = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stderr is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(process.stderr.read())
        seconds = time.monotonic() - start
        for process in processes:
            process.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    return seconds
