"""What a request will cost, in seconds and bytes, from what was seen of earlier ones. Functions over plain values:
what is learned is a JSON value in the store, and who has seen something puts it through `learn_*`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..signature import PipelineSignature

SPEED = "seconds_per_work"
"""Name of the learned speed in the store: a number."""
MEMORY = "memory"
"""Name of what is known of memory in the store: see `learn_memory`."""

_SECONDS_PER_WORK = 2e-7
# What a pipeline makes where neither the request nor its signature says: most families' own defaults.
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
        """Pixels that are made: what memory grows with."""
        return self.width * self.height * self.frames * self.outputs

    @property
    def amount(self) -> float:
        """Pixels times steps: what time grows with."""
        return float(self.size * self.steps * (2 if self.guided else 1))


def work_of(request: Mapping[str, Any], takes: PipelineSignature) -> Work:
    """The work of a job's stored request; what it leaves open is taken from the pipeline's defaults."""
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


def seconds(work: Work, learned: float | None) -> float:
    """How long a request is expected to take; `learned` is what the store holds under `SPEED`."""
    return work.amount * (learned or _SECONDS_PER_WORK)


def learn_speed(learned: float | None, work: Work, seconds: float) -> float | None:
    """The new value for `SPEED` after a request took `seconds` of the ranks' time."""
    if not (seconds > 0 and math.isfinite(seconds) and work.amount > 0):
        return learned
    seen = seconds / work.amount
    # On a logarithmic scale: one slow first request must not outweigh many.
    return seen if not learned else math.exp(math.log(learned) + _LEARNING_RATE * (math.log(seen) - math.log(learned)))


@dataclass(frozen=True)
class Seen:
    """One observation of the fullest rank's memory.

    size: `Work.size` of all that was in flight, 0 for a loaded model at rest. peak_bytes: the most that was held.
    """

    size: int
    peak_bytes: int
    limit_bytes: int | None = None
    """What the device has, where known."""
    out_of_memory: bool = False
    """Whether it did not fit; `peak_bytes` then means nothing."""


def learn_memory(known: Mapping[str, Any] | None, seen: Seen) -> dict[str, Any]:
    """The new value for `MEMORY`: {"limit": bytes or None, "points": [[size, peak bytes], ...] by size, "failed":
    smallest size that did not fit or None}."""
    known = known or {}
    points = {int(size): int(peak) for size, peak in known.get("points", ())}
    failed = known.get("failed")
    if seen.out_of_memory:
        failed = min(seen.size, failed) if failed else seen.size
    else:
        points[seen.size] = max(seen.peak_bytes, points.get(seen.size, 0))
        if failed and seen.size >= failed:
            failed = None  # it does fit, after all: something else was in the way
    kept = sorted(points.items())
    if len(kept) > _POINTS:  # the smallest and the largest say the most
        kept = kept[:2] + kept[-(_POINTS - 2) :]
    return {
        "limit": seen.limit_bytes or known.get("limit"),
        "points": [list(point) for point in kept],
        "failed": failed,
    }


def expected_peak(size: int, known: Mapping[str, Any] | None) -> int:
    """Bytes that the fullest rank is expected to hold at this size, at least those of the decoded pixels.

    Between sizes that were seen the larger one's; beyond the largest in proportion to it, above what the smallest
    needed.
    """
    points = [(int(seen), int(peak)) for seen, peak in (known or {}).get("points", ())]
    least = size * _BYTES_PER_PIXEL
    larger = [peak for seen, peak in points if seen >= size]
    if larger:
        return max(least, min(larger))
    base = points[0][1] if points else 0
    largest, peak = points[-1] if points else (0, 0)
    slope = (peak - base) / (largest - points[0][0]) if len(points) > 1 else 0.0
    return (
        max(least + base if not slope else least, round(base + max(0.0, slope) * (size - points[0][0])))
        if points
        else least
    )


def refuse_if_too_large(work: Work, known: Mapping[str, Any] | None, limit_bytes: int | None) -> None:
    """Raise InputError for a size that will not fit. `limit_bytes` bounds it where the store knows no limit.

    A size up to one that has fitted is never refused.
    """
    known = known or {}
    fitted = max((int(size) for size, _ in known.get("points", ())), default=0)
    if work.size <= fitted:
        return
    failed = known.get("failed")
    if failed and work.size >= failed:
        raise InputError(f"size: {_shown(work)} do not fit the memory: fewer ran out of it; ask for a smaller size")
    limit = known.get("limit") or limit_bytes
    needed = expected_peak(work.size, known)
    if limit and needed > limit:
        raise InputError(
            f"size: {_shown(work)} would need about {needed / 2**30:.1f} GiB of memory on one device, which has "
            f"{limit / 2**30:.1f} GiB; ask for a smaller size"
        )


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
