"""The parallel degrees and schedules that training has; imports no torch."""

from __future__ import annotations

from shardit.config import DEGREES, DiffusionParallelConfig
from shardit.errors import InputError, UnsupportedError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv")
"""The schedules: all forwards before all backwards; one forward, one backward; the same with several chunks a rank, and
with weight gradients in the gaps; two chunks a rank, on the way there and back, with weight gradients in the gaps."""


_AXES = ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size")


def check_degrees(config: DiffusionParallelConfig, schedule: str) -> None:
    """Raise an error for degrees and schedules that training does not have."""
    for name in DEGREES.values():
        if name not in _AXES and getattr(config, name) > 1:
            raise UnsupportedError(
                f"{name}={getattr(config, name)}: training takes only 1; use more stages, tensor ranks or replicas"
            )
    if config.transport == "host":
        raise UnsupportedError("transport='host': torch's schedules send between devices themselves; use 'auto'")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}")
    if config.pipeline_parallel_size > 1 and schedule.startswith("interleaved") and config.pipeline_chunks == 1:
        raise InputError(f"pipeline_chunks=1: schedule={schedule!r} needs at least 2; or use schedule='1f1b'")
    if schedule == "zbv" and config.pipeline_chunks not in (None, 2):
        raise InputError(
            f"pipeline_chunks={config.pipeline_chunks}: schedule='zbv' has 2 chunks per rank; leave it out"
        )
    if schedule in ("gpipe", "1f1b") and (config.pipeline_chunks or 1) > 1:
        raise InputError(
            f"pipeline_chunks={config.pipeline_chunks}: schedule={schedule!r} has one chunk per rank; "
            "use schedule='interleaved'"
        )
