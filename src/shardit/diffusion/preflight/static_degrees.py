"""Checks degrees of parallelism against a model, as far as its files allow.

Otherwise the degrees are compared with the model itself, on ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from shardit.config import DiffusionParallelConfig, fitting_partition
from shardit.core.modules.block_names import count_blocks
from shardit.core.placement.head_counts import check_heads
from shardit.diffusion.loading.diffusers_source import denoises
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.index import Component, read_config


def check_degrees(config: DiffusionParallelConfig, models: Mapping[str, tuple[Component, Checkpoint]]) -> None:
    """Raise InputError or UnsupportedError if the blocks or heads of a denoiser do not fit the degrees.

    models: the components with weights, and their files.
    """
    for part, checkpoint in models.values():
        name = str(part.class_name)
        if not denoises(name):
            continue
        if blocks := count_blocks({key: checkpoint.entry(key).shape for key in checkpoint.files}):
            fitting_partition(config, os.environ, blocks)
        if heads := _heads(part):
            check_heads(config.tensor_parallel_size, name, heads)


def _heads(part: Component) -> int | None:
    """Return the heads of a model's attention, if its configuration has one number of them."""
    numbers = {key: value for key, value in (read_config(part) or {}).items() if "head" in key and "dim" not in key}
    heads = numbers.get("num_attention_heads")
    return heads if len(numbers) == 1 and isinstance(heads, int) else None
