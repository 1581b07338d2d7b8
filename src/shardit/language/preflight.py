"""Checks a language model and the arguments of `LLM` by its files alone, before torch is imported and ranks start."""

from __future__ import annotations

from shardit.config import DiffusionParallelConfig, check_stages
from shardit.core.modules.block_names import count_blocks
from shardit.language.limits import POSITION_LIMITS, check_axes, check_max_model_len
from shardit.language.loading.source import DecoderSource, read_config
from shardit.loading.checkpoint import Checkpoint


def check_decoder(source: DecoderSource, config: DiffusionParallelConfig, max_model_len: int | None) -> None:
    """Raise InputError or UnsupportedError for what the files of a model on this disk show."""
    check_axes(config)
    if source.remote is not None or source.gguf is not None:
        return
    own = read_config(source.folder)
    if "text_config" not in own:
        check_max_model_len(
            max_model_len, next((own[name] for name in POSITION_LIMITS if isinstance(own.get(name), int)), None)
        )
    checkpoint = Checkpoint.open(source.folder)
    for file in checkpoint.names:
        checkpoint.header(file)
    if blocks := count_blocks({name: checkpoint.entry(name).shape for name in checkpoint.files}):
        check_stages(config.pipeline_parallel_size, blocks)
