"""From what the ranks made to files in the job's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..output import Output


def write_results(output: Output, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Write pictures or videos into a folder; returns their names, and facts worth keeping with the job.

    Files appear complete or not at all. Raises InputError where they cannot be written (disk full, read-only).
    """
    written = output.save(folder / ("output.mp4" if output.frames else "output.png"))
    first = output.frames[0][0] if output.frames else output.images[0]
    facts: dict[str, Any] = {
        "seconds": output.seconds,
        "width": first.width,
        "height": first.height,
        "notes": [*output.notes, *output.metrics.get("warnings", ())],
    }
    if output.frames:
        facts.update(num_frames=len(output.frames[0]), fps=output.fps)
    return [path.name for path in written], facts
