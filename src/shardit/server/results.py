"""From what the ranks made to files in the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..output import Output

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Of result files, by the names that OpenAI has for their formats."""


def write_results(output: Output, folder: Path, look: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Write pictures or videos into a folder; returns their names, and facts worth keeping with the job. `look` may
    have "output_format" (png by default) and "output_compression" (quality from 0 to 100).

    Files appear complete or not at all. Raises InputError where they cannot be written (disk full, read-only).
    """
    suffix = ".mp4" if output.frames else SUFFIXES[look.get("output_format", "png")]
    written = output.save(folder / f"output{suffix}", quality=look.get("output_compression"))
    first = output.frames[0][0] if output.frames else output.images[0]
    facts: dict[str, Any] = {
        "seconds": output.seconds,
        "width": first.width,
        "height": first.height,
        "notes": output.notes,
    }
    if output.frames:
        facts.update(num_frames=len(output.frames[0]), fps=output.fps)
    return [path.name for path in written], facts
