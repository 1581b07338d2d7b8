"""`EngineArgs`: the arguments of `LLM` as data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import DiffusionParallelConfig, reject_unknown_names
from shardit.engine.process.messages import TIMEOUT
from shardit.engine.process.process import started_by_torchrun
from shardit.errors import InputError
from shardit.language.options import LanguageOptions
from shardit.params import SEED
from shardit.settings.checks import whole
from shardit.settings.declare import declared, hinted
from shardit.settings.model_options import model_options

BACKENDS = ("mp", "ray")
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
    num_nodes: int = 1
    lora: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> EngineArgs:
        reject_unknown_names(cls.__name__, kwargs, cls.names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        LanguageOptions(**{item.name: getattr(self, item.name) for item in declared(LanguageOptions)})
        model_options(lora=self.lora)
        config = DiffusionParallelConfig(**{name: getattr(self, name) for name in SIZES})
        check_launch(config, self.seed, self.timeout_s, self.distributed_executor_backend, self.num_nodes)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all arguments."""
        return [item.name for item in fields(cls)]

    def as_kwargs(self) -> dict[str, Any]:
        """Return the keywords of `LLM`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def check_launch(config: DiffusionParallelConfig, seed: Any, timeout_s: Any, backend: Any, num_nodes: Any) -> None:
    """Raise InputError for wrong values of arguments of `LLM` that no other class declares."""
    if seed is not None:
        SEED("seed", seed)
    TIMEOUT("timeout_s", timeout_s)
    if backend not in (None, *BACKENDS):
        raise InputError(
            f'distributed_executor_backend must be "mp" (processes of this machine), "ray" or None, got {backend!r}'
        )
    whole(1)("num_nodes", num_nodes)
    if num_nodes > 1 and backend != "ray":
        raise InputError('num_nodes needs distributed_executor_backend="ray"; or start the program with torchrun')
    if config.world_size % num_nodes:
        raise InputError(f"num_nodes={num_nodes}: {config.world_size} ranks cannot be distributed evenly over them")
    if backend == "ray" and started_by_torchrun(os.environ):
        raise InputError('distributed_executor_backend="ray": torchrun has started the ranks; use one of the two')
