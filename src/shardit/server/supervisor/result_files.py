"""Writes outputs of ranks to files in the job's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardit.diffusion.output.output import Output, savable
from shardit.diffusion.output.target import SUFFIXES as BY_KIND

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Suffixes of result files, by OpenAI's names of their formats."""


def write_results(output: Output, folder: Path, encoding: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Write the main content of the output into a folder; returns the names of the files, and details to store with the
    job. `encoding` may have "output_format" (png by default) and "output_compression" (0 to 100) of images.

    Files appear complete or not at all. Raises InputError if they cannot be written (disk full, read-only).
    """
    output, lost = savable(output)
    kind = output.kinds[0] if output.kinds else "image"
    suffix = SUFFIXES[encoding.get("output_format", "png")] if kind == "image" else BY_KIND[kind][0]
    target = folder / f"output{suffix}"
    written = output.save(target, quality=encoding.get("output_compression"))
    notes = [*output.notes, *lost, *(f"not in the file: {name}" for name in output.left_out(target))]
    details: dict[str, Any] = {"seconds": output.seconds, "notes": notes}
    images = output.frames[0] if output.frames else output.pictures()
    if images:
        details.update(width=images[0].width, height=images[0].height)
    if output.audio is not None:
        details["sample_rate"] = output.sample_rate
    if output.frames:
        details.update(num_frames=len(output.frames[0]), fps=output.fps)
    return [path.name for path in written], details
