"""Degrees of parallelism that do not go with a model, as far as its files tell.

Where they do not tell, the degrees are compared with the model itself, on ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from shardit.config import DiffusionParallelConfig, check_heads, fitting_partition
from shardit.core.modules.block_names import count_blocks
from shardit.diffusion.loading.diffusers_source import denoises
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.index import Component, read_config


def check_degrees(config: DiffusionParallelConfig, models: Mapping[str, tuple[Component, Checkpoint]]) -> None:
    """Raise InputError or UnsupportedError where the blocks or heads of one that denoises do not go with the degrees.

    models: the components that have weights, and their files.
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
    """The heads of a model's attention, where its configuration has one number of them."""
    numbers = {key: value for key, value in (read_config(part) or {}).items() if "head" in key and "dim" not in key}
    heads = numbers.get("num_attention_heads")
    return heads if len(numbers) == 1 and isinstance(heads, int) else None
