"""`EngineArgs`: the arguments of `LLM` as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import reject_unknown_names


@dataclass(frozen=True)
class EngineArgs:
    """The arguments of `LLM` under vLLM's names, as data: LLM(**EngineArgs(...).as_kwargs())."""

    model: str = ""
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    dtype: str | None = None
    device: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | None = None
    seed: int | None = None
    gpu_memory_utilization: float | None = None
    timeout_s: float = 600
    layer_partition: Sequence[int] | None = None
    distributed_executor_backend: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> EngineArgs:
        reject_unknown_names(cls.__name__, kwargs, cls.names())
        return super().__new__(cls)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all arguments."""
        return [item.name for item in fields(cls)]

    def as_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `LLM`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
