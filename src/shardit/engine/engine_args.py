"""`EngineArgs`: the arguments of `LLM` as data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.config import TIMEOUT_S, DiffusionParallelConfig, reject_unknown_names
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
    """The arguments of `LLM` under vLLM's names, as data: LLM(**EngineArgs(...).as_kwargs()).

    Unknown names and wrong values raise InputError here. Values that do not fit the model raise it in `LLM`.
    """

    model: str = ""
    """Hub id, folder of transformers, GGUF file, short name ("smollm2-135m") or "tiny/NAME"."""
    pipeline_parallel_size: int = 1
    """Number of stages that the layers are split into, at least 1. Error at load: more ranks than layers."""
    tensor_parallel_size: int = 1
    """Number of ranks that each linear layer is split across, at least 1. Error at load: no rule for the model."""
    data_parallel_size: int = 1
    """Number of replicas of the model, at least 1; each runs its share of the prompts."""
    dtype: str | None = None
    """Data type of the weights, such as "bfloat16"; None for that of the files (float32 for GGUF files)."""
    device: str | None = None
    """Device of the ranks, "cuda" or "cpu"; None for cuda if there is one."""
    max_model_len: int | None = None
    """Maximum tokens of a prompt and its text together, at least 1; None for the room of the model."""
    max_num_seqs: int = LanguageOptions.max_num_seqs
    """Maximum texts of a batch, at least 1; there is a batch for each stage."""
    max_num_batched_tokens: int | None = None
    """Maximum tokens of prompts in one step, at least 1; None for 64 on CPUs and 512 on GPUs."""
    kv_cache_memory: int | str | None = None
    """Maximum memory of keys and values on a rank, in bytes or as "2GiB"; None for half of what is free."""
    seed: int | None = None
    """Seed of prompts without one: text i of a call has seed + i. None draws one for each text."""
    gpu_memory_utilization: float | None = None
    """Share of a rank's memory for its weights and the cache of one text of maximum length, above 0 and at most 1.
    Error at load: they need more. None: no limit."""
    timeout_s: float = TIMEOUT_S
    """Timeout for a message of another rank, in seconds: more than 0. A timeout raises RankError."""
    layer_partition: Sequence[int] | None = None
    """Layers of each stage, such as [8, 12, 12, 8]; None balances them. Error: a wrong number of entries, or (at load)
    a wrong sum."""
    distributed_executor_backend: str | None = None
    """Launcher of ranks: "mp" or None for processes of this machine, "ray" for actors of Ray. Error: "ray" under
    torchrun."""
    num_nodes: int = 1
    """Number of machines for "ray", at least 1. Error: a number that does not divide the ranks, or more than 1 without
    "ray"."""
    lora: Any = None
    """Adapters of peft that are merged into the weights: a folder or hub id (optionally with ":SCALE" at its end),
    (path, scale), or a list of these."""

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
