"""The maximum length of a language model, and the axes that it supports; imports no torch."""

from __future__ import annotations

from shardit.config import DiffusionParallelConfig
from shardit.errors import InputError, UnsupportedError

POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
"""Names of the maximum number of positions in configurations."""


def check_max_model_len(max_model_len: int | None, limit: int | None) -> None:
    """Raise InputError if `max_model_len` is more than the model's own limit."""
    if max_model_len is not None and limit is not None and max_model_len > limit:
        raise InputError(f"max_model_len={max_model_len} is more than the {limit} tokens that the model has room for")


def check_axes(config: DiffusionParallelConfig) -> None:
    """Raise UnsupportedError for axes that a language model does not have."""
    for name in ("ulysses_degree", "ring_degree", "cfg_parallel_size", "vae_patch_parallel_size"):
        if getattr(config, name) > 1:
            raise UnsupportedError(
                f"{name}={getattr(config, name)}: a language model runs over pipeline_parallel_size, "
                "tensor_parallel_size and data_parallel_size; set it to 1"
            )
    if config.pipeline_chunks not in (None, 1):
        raise UnsupportedError(
            f"pipeline_chunks={config.pipeline_chunks}: the stages of a language model are contiguous; leave it out"
        )
