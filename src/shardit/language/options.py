"""The settings with which a language model is loaded and batched; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardit.settings.byte_sizes import BYTES, byte_size
from shardit.settings.checks import number, whole
from shardit.settings.declare import Flag, check_declared, declare


@dataclass(frozen=True)
class LanguageOptions:
    """Lengths, batches and memory of a language model. Wrong values raise InputError."""

    max_model_len: int | None = declare(
        None, "Maximum tokens of a prompt and its text together. [default: the room of the model]", whole(1)
    )
    max_num_seqs: int = declare(32, "Maximum texts of a batch; there is a batch for each stage.", whole(1))
    max_num_batched_tokens: int | None = declare(
        None,
        "Maximum tokens of prompts that are computed between two tokens of running texts. "
        "[default: 64 on CPUs, 512 on GPUs]",
        whole(1),
    )
    kv_cache_memory: Any = declare(
        None,
        "Maximum memory of keys and values on a rank, as in 2GiB. [default: half of what is free]",
        BYTES,
        flag=Flag(kind=str | None, metavar="<bytes>"),
    )
    """A number, or a text with a unit; then the number."""
    gpu_memory_utilization: float | None = declare(
        None,
        "Share of a rank's memory into which its weights and the cache of one text of maximum length must fit.",
        number(above=0, maximum=1),
    )

    def __post_init__(self) -> None:
        check_declared(self)
        if self.kv_cache_memory is not None:
            object.__setattr__(self, "kv_cache_memory", byte_size(self.kv_cache_memory))
