"""What a request will cost, in seconds and bytes, from what was seen of earlier ones. Functions over plain values:
what is learned is a JSON value in the store, and who has seen something puts it through `learn_*`."""

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
    """One observation of the memory of the rank that is nearest to its limit."""

    size: int
    """`Work.size` of all that was in flight; 0: a loaded model at rest."""
    peak_bytes: int
    """The most that was held. Means nothing where it did not fit."""
    limit_bytes: int | None = None
    """What there is, where known."""
    out_of_memory: bool = False
    """Whether it did not fit."""


def learn_memory(known: Mapping[str, Any] | None, seen: Seen) -> dict[str, Any]:
    """The new value for `MEMORY`: {"limit": bytes or None, "points": [[size, peak bytes], ...] by size, "failed":
    the smallest size that did not fit, or None}."""
    known = known or {}
    points, failed = dict(_points(known)), known.get("failed")
    if seen.out_of_memory:
        failed = min(seen.size, failed or seen.size)
        # Smaller requests may have fitted together, or less was left: what was seen from here on says nothing now.
        points = {size: peak for size, peak in points.items() if size < failed}
    else:
        points[seen.size] = max(seen.peak_bytes, points.get(seen.size, 0))
        if failed and seen.size >= failed:
            failed = None  # it does fit: something else was in the way
    kept = sorted(points.items())
    if len(kept) > _POINTS:  # the smallest and the largest say the most
        kept = kept[:2] + kept[-(_POINTS - 2) :]
    return {
        "limit": seen.limit_bytes or known.get("limit"),
        "points": [list(point) for point in kept],
        "failed": failed,
    }


def forgive(known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The value for `MEMORY` in a server that starts: sizes that did not fit get another chance."""
    return None if known is None else {**known, "failed": None}


def expected_peak(size: int, known: Mapping[str, Any] | None) -> int:
    """Bytes that the fullest rank is expected to hold at this size.

    Up to the largest size that was seen: what was held then. Beyond it in proportion, at the slope that was seen
    between sizes, and at least as much as the decoded pixels need.
    """
    points = _points(known or {})
    larger = [peak for seen, peak in points if seen >= size]
    if larger:
        return min(larger)
    if not points:
        return size * _BYTES_PER_PIXEL
    largest, peak = points[-1]
    # Rest says nothing of the slope: what a first request costs once would be taken for what each pixel costs.
    smallest, least = next((point for point in points if point[0] > 0), points[-1])
    slope = (peak - least) / (largest - smallest) if largest >= 2 * smallest > 0 else 0.0
    return peak + round((size - largest) * max(slope, _BYTES_PER_PIXEL))


def refuse_if_too_large(work: Work, known: Mapping[str, Any] | None, limit_bytes: int | None) -> None:
    """Raise InputError for a size that will not fit. `limit_bytes` bounds it where the store knows no limit.

    A size up to one that has fitted, and none that did not since, is never refused.
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
