"""`EngineArgs`: the arguments of `LLM` as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import DiffusionParallelConfig, reject_unknown_names
from shardit.engine.process.messages import TIMEOUT
from shardit.errors import UnsupportedError
from shardit.params import SEED
from shardit.settings.byte_sizes import byte_size
from shardit.settings.checks import number, whole
from shardit.settings.declare import hinted

CHECKS = {
    "max_model_len": whole(1),
    "max_num_seqs": whole(1),
    "max_num_batched_tokens": whole(1),
    "kv_cache_memory": whole(1),
    "seed": SEED,
    "gpu_memory_utilization": number(above=0, maximum=1),
    "timeout_s": TIMEOUT,
}
"""The checks of arguments of `LLM`, but for the sizes of the parallel configuration."""

SIZES = ("pipeline_parallel_size", "tensor_parallel_size", "data_parallel_size", "layer_partition")


@hinted("args")
@dataclass(frozen=True)
class EngineArgs:
    """The arguments of `LLM` under vLLM's names, as data: LLM(**EngineArgs(...).as_kwargs()). Wrong values raise
    InputError."""

    model: str = ""
    pipeline_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    dtype: str | None = None
    device: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    kv_cache_memory: int | str | None = None
    seed: int | None = None
    gpu_memory_utilization: float | None = None
    timeout_s: float = 600
    layer_partition: Sequence[int] | None = None
    distributed_executor_backend: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> EngineArgs:
        reject_unknown_names(cls.__name__, kwargs, cls.names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = self.as_kwargs()
        check_values(given)
        DiffusionParallelConfig(**{name: given[name] for name in SIZES})

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all arguments."""
        return [item.name for item in fields(cls)]

    def as_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `LLM`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def check_values(given: Mapping[str, Any]) -> None:
    """Raise InputError for wrong values of arguments of `LLM`. None is valid where it is the default."""
    for name, check in CHECKS.items():
        if name in given and (given[name] is not None or getattr(EngineArgs, name) is not None):
            check(name, byte_size(name, given[name]) if name == "kv_cache_memory" else given[name])
    backend = given.get("distributed_executor_backend")
    if backend not in (None, "mp"):
        raise UnsupportedError(
            f"distributed_executor_backend={backend!r}: LLM starts processes of this machine; "
            'use "mp", or torchrun for several machines'
        )
