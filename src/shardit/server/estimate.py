"""Estimates the cost of a request, in seconds and bytes, from observations of earlier ones. Functions over plain
values: learned state is a JSON value in the store, and observers update it by `learn_*`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.errors import InputError

SPEED = "seconds_per_work"
"""Name of the learned speed in the store: a number."""
MEMORY = "memory"
"""Name of the learned memory use in the store: see `learn_memory`."""

_SECONDS_PER_WORK = 2e-7
# Sizes of an output if neither the request nor its signature sets them: most families' own defaults.
_SIDE, _STEPS, _FRAMES = 1024, 50, 81
_LEARNING_RATE = 0.2
_POINTS = 16
_BYTES_PER_PIXEL = 3 * 4  # three colours in float32, as every VAE decodes them


@dataclass(frozen=True)
class Work:
    """The size of one request."""

    width: int
    height: int
    frames: int
    steps: int
    outputs: int
    guided: bool
    """Whether each step computes the transformer twice."""

    @property
    def size(self) -> int:
        """Number of output pixels: memory grows with it."""
        return self.width * self.height * self.frames * self.outputs

    @property
    def amount(self) -> float:
        """Pixels times steps: time grows with it."""
        return float(self.size * self.steps * (2 if self.guided else 1))


NO_WORK = Work(0, 0, 0, 0, 0, False)
"""Of a request whose cost is not estimated here."""


def work_of(request: Mapping[str, Any], takes: PipelineSignature) -> Work:
    """Return the work of a job's stored request; missing values are taken from the pipeline's defaults."""
    given = {**(request.get("extra_args") or {}), **request}

    def number(name: str, default: int) -> int:
        value = given.get(name) or takes.defaults.get(name) or default
        return int(value)

    listed = given.get("sigmas") or given.get("timesteps")
    side = number("resolution", _SIDE) if "resolution" in takes.names else _SIDE
    return Work(
        width=number("width", side),
        height=number("height", side),
        frames=number("num_frames", _FRAMES) if takes.kind == "video" else 1,
        steps=len(listed) if listed else number("num_inference_steps", _STEPS),
        outputs=number("num_outputs_per_prompt", 1) * (number("layers", 1) if "layers" in takes.names else 1),
        guided=_is_guided(given, takes),
    )


def seconds(work: Work, speed: float | None) -> float:
    """Return the expected seconds of a request; `speed`: the value of `SPEED` in the store."""
    return work.amount * (speed or _SECONDS_PER_WORK)


def learn_speed(speed: float | None, work: Work, seconds: float) -> float | None:
    """Return the new value for `SPEED` after a request took `seconds` of the ranks' time."""
    if not (seconds > 0 and math.isfinite(seconds) and work.amount > 0):
        return speed
    seen = seconds / work.amount
    # On a logarithmic scale: one slow first request must not outweigh many.
    return seen if not speed else math.exp(math.log(speed) + _LEARNING_RATE * (math.log(seen) - math.log(speed)))


@dataclass(frozen=True)
class MemorySample:
    """One observation of the memory of the rank that is nearest to its limit."""

    size: int
    """Sum of `Work.size` of all requests in flight; 0: a loaded model at rest."""
    peak_bytes: int
    """Peak memory. Meaningless if it ran out of memory."""
    limit_bytes: int | None = None
    """The memory limit, if known."""
    out_of_memory: bool = False
    """Whether it ran out of memory."""


def learn_memory(known: Mapping[str, Any] | None, seen: MemorySample) -> dict[str, Any]:
    """Return the new value for `MEMORY`: {"limit": bytes or None, "points": [[size, peak bytes], ...] by size,
    "failed": the smallest size that ran out of memory, or None}."""
    known = known or {}
    points, failed = dict(_points(known)), known.get("failed")
    if seen.out_of_memory:
        failed = min(seen.size, failed or seen.size)
        # Smaller requests may have fitted together, or less memory was free: observations from this size on are now
        # invalid.
        points = {size: peak for size, peak in points.items() if size < failed}
    else:
        points[seen.size] = max(seen.peak_bytes, points.get(seen.size, 0))
        if failed and seen.size >= failed:
            failed = None  # it does fit: something else used the memory
    kept = sorted(points.items())
    if len(kept) > _POINTS:  # the smallest and the largest are the most informative
        kept = kept[:2] + kept[-(_POINTS - 2) :]
    return {
        "limit": seen.limit_bytes or known.get("limit"),
        "points": [list(point) for point in kept],
        "failed": failed,
    }


def reset_failures(known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the value for `MEMORY` in a server that starts: forget the size that once ran out of memory."""
    return None if known is None else {**known, "failed": None}


def expected_peak(size: int, known: Mapping[str, Any] | None) -> int:
    """Return the bytes that the fullest rank is expected to use at this size.

    Up to the largest observed size: the observed bytes. Beyond it in proportion, at the observed slope between sizes,
    and at least as much as the decoded pixels need.
    """
    points = _points(known or {})
    larger = [peak for seen, peak in points if seen >= size]
    if larger:
        return min(larger)
    if not points:
        return size * _BYTES_PER_PIXEL
    largest, peak = points[-1]
    # A loaded model at rest is no basis for the slope: one-time costs of a first request would count as cost per pixel.
    smallest, least = next((point for point in points if point[0] > 0), points[-1])
    slope = (peak - least) / (largest - smallest) if largest >= 2 * smallest > 0 else 0.0
    return peak + round((size - largest) * max(slope, _BYTES_PER_PIXEL))


def refuse_if_too_large(work: Work, known: Mapping[str, Any] | None, limit_bytes: int | None) -> None:
    """Raise InputError for a size that will not fit. `limit_bytes` is the limit if the store has none.

    A size is never refused if it is at most one that has fitted, with no failure since.
    """
    known = known or {}
    failed = known.get("failed")
    if work.size <= max((size for size, _ in _points(known)), default=0):
        return
    if failed and work.size >= failed:
        raise InputError(
            f"size: {_shown(work)} will not fit, as the memory did not suffice for {failed} pixels; ask for less"
        )
    limit = known.get("limit") or limit_bytes
    needed = expected_peak(work.size, known)
    if limit and needed > limit:
        raise InputError(
            f"size: {_shown(work)} would need about {needed / 2**30:.1f} GiB of memory on one device, which has "
            f"{limit / 2**30:.1f} GiB; ask for less"
        )


def _points(known: Mapping[str, Any]) -> list[tuple[int, int]]:
    return sorted((int(size), int(peak)) for size, peak in known.get("points", ()))


def _is_guided(given: Mapping[str, Any], takes: PipelineSignature) -> bool:
    def scale(name: str) -> float:
        value = given.get(name)
        return float(takes.defaults.get(name) or 0) if value is None else float(value)

    if "true_cfg_scale" in takes.names:  # guidance_scale is then a distilled one, which costs nothing
        return scale("true_cfg_scale") > 1 and given.get("negative_prompt") is not None
    return scale("guidance_scale") > 1


def _shown(work: Work) -> str:
    parts = [f"{work.width}x{work.height}"]
    parts += [f"{work.frames} frames"] if work.frames > 1 else []
    parts += [f"{work.outputs} outputs"] if work.outputs > 1 else []
    return f"{' x '.join(parts)} ({work.size} pixels)"
