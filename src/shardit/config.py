"""The distribution of a model over devices: the parallel degrees and the layer partition."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from shardit.errors import InputError, UnsupportedError, did_you_mean
from shardit.settings.checks import FLAG, matching, numbers, whole
from shardit.settings.declare import Flag, check_declared, declare, hinted

PARTITION_VARIABLES = ("SHARDIT_PP_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION")
"""Environment variables that give a layer partition, the first that is set wins."""

DEGREES = {
    "dp": "data_parallel_size",
    "cfg": "cfg_parallel_size",
    "pp": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tp": "tensor_parallel_size",
}
"""The degree of each axis, outermost first: neighbouring ranks share `tp`, so that the axis that talks most gets the
fastest links."""

TIMEOUT_S = 600.0
"""Seconds that a rank waits for a message of another one, unless another number is set."""

PARTITION = numbers(whole(1))
"""The check of a layer partition."""


@hinted("config")
@dataclass(frozen=True)
class DiffusionParallelConfig:
    """Degrees of parallelism. Every degree is a number of ranks, at least 1; 1 switches the axis off.

    Wrong values raise `InputError`.
    """

    pipeline_parallel_size: int = declare(
        1, "Number of pipeline stages that the blocks of the transformer are split into.", whole(1)
    )
    """Error: more ranks than blocks (at load)."""

    tensor_parallel_size: int = declare(1, "Number of ranks that each linear layer is split across.", whole(1))
    """The linears inside the blocks of the transformer, and those of text encoders. Error: more ranks than heads, or a
    transformer whose parts no rule matches (at load)."""

    ulysses_degree: int = declare(
        1,
        "Ulysses degree: number of ranks that split the tokens, and the heads within attention.",
        whole(1),
        flag=Flag(short="--usp"),
    )
    """Error: a model whose blocks cannot be cut by tokens (at the first call)."""

    ring_degree: int = declare(
        1,
        "Ring attention degree: number of ranks that split the tokens and pass keys and values around.",
        whole(1),
        flag=Flag(short="--ring"),
    )
    """Error: a model whose blocks cannot be cut by tokens, or an attention back end that is not native (at the first
    call)."""

    sequence_parallel_size: int | None = declare(
        None, "Number of ranks that split the tokens. [default: ulysses_degree x ring_degree]", whole(1), flag=None
    )
    """Error: any other product."""

    cfg_parallel_size: int = declare(
        1, "Number of ranks that compute the branches of classifier-free guidance.", whole(1)
    )
    """Or the samples of a batch. Error: more ranks than branches x samples of a step (in the first step)."""

    data_parallel_size: int = declare(
        1, "Number of replicas of the model; each runs its share of the requests.", whole(1)
    )

    vae_patch_parallel_size: int = declare(1, "Number of ranks that the tiles of the VAE are split across.", whole(1))
    """These ranks are not extra ones. More than 1 switches the VAE's tiling on. Error: more than the ranks that work on
    one request (all axes but data_parallel_size), or (at load) a VAE that cannot work in tiles."""

    pipeline_chunks: int | None = declare(
        None, "Chunks of blocks per rank; 1 gives each rank one contiguous range. [default: automatic]", whole(1)
    )
    """Automatic: chosen at load by the number of calls in flight. More than 1: looped placement."""

    layer_partition: Sequence[int] | None = declare(
        None,
        "Blocks per stage or chunk, such as 8,12,12,8. [default: balanced]",
        PARTITION,
        flag=Flag(kind=str | None, read=lambda text: parse_layer_partition(text, "--layer-partition")),
    )
    """Blocks per stage (pipeline_parallel_size entries, contiguous) or per chunk in chunk order
    (pipeline_parallel_size x pipeline_chunks entries), counted over a transformer's block lists in the order of a
    forward. If it is None, the environment decides (see `resolve_layer_partition`), else blocks are balanced by
    cost. Error: a wrong number of entries, or (at load) a wrong sum."""

    split_batch: bool = declare(
        True,
        "Whether a batched transformer call (batched guidance, several outputs per prompt) is split by sample if "
        "that fills the pipeline.",
        FLAG,
        flag=None,
    )
    """False keeps the batch whole, which keeps the last bits too."""

    transport: str = declare(
        "auto",
        "Way of messages between ranks: auto (NCCL on GPUs, gloo on CPUs), or host (through host memory, over gloo).",
        matching("auto or host", lambda value: value in ("auto", "host")),
    )
    """host: for devices that cannot send to each other, and for ranks that share a GPU. Error: any other value."""

    def __new__(cls, *args: Any, **kwargs: Any) -> DiffusionParallelConfig:
        reject_unknown_names(cls.__name__, kwargs, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_declared(self)
        self._check_sequence_parallel_size()
        self._check_vae_patch_parallel_size()
        if self.layer_partition is not None:
            # A tuple, whatever was given: a frozen object must not change through its caller's list.
            object.__setattr__(self, "layer_partition", tuple(self.layer_partition))
            partition_chunks(self, self.layer_partition, "layer_partition")

    def _check_sequence_parallel_size(self) -> None:
        product = self.ulysses_degree * self.ring_degree
        if self.sequence_parallel_size not in (None, product):
            raise InputError(
                f"sequence_parallel_size={self.sequence_parallel_size} must equal ulysses_degree x ring_degree "
                f"= {self.ulysses_degree} x {self.ring_degree} = {product}; leave it out or correct one of them"
            )

    def _check_vae_patch_parallel_size(self) -> None:
        most = self.world_size // self.data_parallel_size
        if self.vae_patch_parallel_size > most:
            valid = f"from 1 to {most}" if most > 1 else "1"
            raise InputError(
                f"vae_patch_parallel_size={self.vae_patch_parallel_size} adds no ranks, and {most} "
                f"{'work' if most > 1 else 'works'} on one request: it must be {valid}, or raise another degree"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks that this configuration needs."""
        return math.prod(getattr(self, name) for name in DEGREES.values())


ParallelConfig = DiffusionParallelConfig
"""The same class, by a name without diffusion."""


def config_of(
    config: Any, fields_given: Mapping[str, Any], callee: str, others: Sequence[str] = (), *, listed: bool = True
) -> DiffusionParallelConfig:
    """Return the configuration that a call of `callee` asks for, given whole or by its fields as keywords.

    `others` are the keywords that `callee` takes itself; unless `listed`, they include the fields to propose. Raises
    InputError if both are given, if `config` is something else, or if a keyword is neither a field nor one of
    `others`.
    """
    names = [item.name for item in fields(DiffusionParallelConfig)]
    unknown = [name for name in fields_given if name not in names]
    reject_unknown_names(callee, unknown, [*others, *names] if listed else others)
    if config is not None and not isinstance(config, DiffusionParallelConfig):
        raise InputError(f"{callee}: the parallel configuration must be a DiffusionParallelConfig, got {config!r:.80}")
    if config is not None and fields_given:
        raise InputError(
            f"{callee}: {next(iter(fields_given))} is a field of the parallel configuration, which is given too; "
            "set it there, or leave the configuration out"
        )
    return config if config is not None else DiffusionParallelConfig(**fields_given)


DEVICES = ("cpu", "cuda")
"""Types of devices that ranks run on; ROCm devices are of type cuda."""


def device_kind(device: str) -> str:
    """Return the type of a device by its name, such as "cuda:1". Raises UnsupportedError if ranks do not run on
    it."""
    kind, _, number = device.partition(":")
    if not kind or (kind not in DEVICES and kind not in os.environ.get("SHARDIT_ALLOW_DEVICE", "").split(",")):
        allow = f"; to try it, set SHARDIT_ALLOW_DEVICE={kind}" if kind.isidentifier() else ""
        raise UnsupportedError(f"device {kind!r} is not supported (use cpu or cuda){allow}")
    if ":" in device and not number.isdecimal():
        raise InputError(f"device {device!r} must be a type and a number, such as cuda:0")
    return kind


def parse_layer_partition(text: str, source: str) -> tuple[int, ...]:
    """Turn "8,12,12,8" into (8, 12, 12, 8); `source` is what an error calls the text."""
    entries = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        # isdecimal alone would let other scripts' digits through, int() alone "1_0" and "+3".
        if not (entry.isascii() and entry.removeprefix("-").isdecimal()):
            raise InputError(
                f"{source}={text!r} must be whole numbers with commas between them, such as 8,12,12,8; "
                f"{entry!r} is not a number"
            )
    PARTITION(source, partition := tuple(map(int, entries)))
    return partition


def resolve_layer_partition(
    config: DiffusionParallelConfig, environ: Mapping[str, str]
) -> tuple[tuple[int, ...] | None, str]:
    """Return the layer partition in force and the name of where it came from; (None, "automatic") where none is
    given."""
    if config.layer_partition is not None:
        return tuple(config.layer_partition), "layer_partition"
    for variable in PARTITION_VARIABLES:
        if text := environ.get(variable, "").strip():
            partition = parse_layer_partition(text, variable)
            partition_chunks(config, partition, variable)
            return partition, variable
    return None, "automatic"


def check_partition_variables(config: DiffusionParallelConfig, environ: Mapping[str, str]) -> None:
    """Raise InputError if the environment's layer partition is wrong whatever the model is.

    Without stages its number of entries is left to the model: one without blocks takes no notice of a partition.
    """
    if config.pipeline_parallel_size > 1:
        resolve_layer_partition(config, environ)
    elif config.layer_partition is None:
        set_ones = ((name, text) for name in PARTITION_VARIABLES if (text := environ.get(name, "").strip()))
        for name, text in list(set_ones)[:1]:
            parse_layer_partition(text, name)


def partition_chunks(config: DiffusionParallelConfig, partition: Sequence[int], source: str) -> int:
    """Chunks per rank that a partition asks for; a partition with one entry per stage asks for contiguous stages."""
    stages, chunks, entries = config.pipeline_parallel_size, config.pipeline_chunks, len(partition)
    if chunks is not None:
        if entries != stages * chunks:
            raise InputError(
                f"{source} has {entries} entries, but pipeline_parallel_size={stages} with pipeline_chunks={chunks} "
                f"needs {stages * chunks}; give that many or change pipeline_chunks"
            )
        return chunks
    # One rank and several entries is far more likely a forgotten pipeline_parallel_size than a wish for chunks.
    if entries % stages or (stages == 1 and entries > 1):
        raise InputError(
            f"{source} has {entries} entries, but pipeline_parallel_size={stages} needs {stages} "
            f"(or {stages} x pipeline_chunks); change one of them"
        )
    return entries // stages


def idle_chunks(config: DiffusionParallelConfig) -> str | None:
    """Return a warning about `pipeline_chunks` without effect, since there is one stage; else None."""
    if config.pipeline_parallel_size > 1 or (config.pipeline_chunks or 1) == 1:
        return None
    return (
        f"pipeline_chunks={config.pipeline_chunks} changes nothing with pipeline_parallel_size=1: leave it out, or use "
        "more stages"
    )


def fitting_partition(
    config: DiffusionParallelConfig, environ: Mapping[str, str], num_blocks: int
) -> tuple[int, ...] | None:
    """Return the layer partition in force, None if none is given. Raises InputError and UnsupportedError if a
    transformer with so many blocks does not go with it, or with the number of stages."""
    partition, source = resolve_layer_partition(config, environ)
    if partition is None:
        check_stages(config.pipeline_parallel_size, num_blocks)
        return None
    partition_chunks(config, partition, source)
    if sum(partition) != num_blocks:
        raise InputError(
            f"{source} {','.join(map(str, partition))} adds up to {sum(partition)}, but the transformer has "
            f"{num_blocks} blocks; change the entries so that they add up to {num_blocks}"
        )
    return partition


def check_stages(pp_size: int, num_blocks: int) -> None:
    """Raise UnsupportedError if there are more stages than blocks."""
    if num_blocks < pp_size:
        raise UnsupportedError(
            f"pipeline_parallel_size={pp_size} is more than the {num_blocks} blocks of the model; "
            f"use at most {num_blocks}"
        )


def get_pp_indices(num_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
    """First and past-the-last layer of one stage of an even partition.

    Sizes differ by at most one. The stages just before the last take the rest, because the last one also runs
    the code after the blocks.
    """
    whole(1)("num_layers", num_layers)
    whole(1)("pp_size", pp_size)
    whole(0, pp_size - 1)("pp_rank", pp_rank)
    if num_layers < pp_size:
        raise InputError(f"{num_layers} layers cannot fill {pp_size} stages; use at most {num_layers} stages")
    size, left_over = divmod(num_layers, pp_size)
    first_larger = pp_size - 1 - left_over  # stages first_larger .. pp_size - 2 hold one layer more
    start = pp_rank * size + max(0, min(pp_rank - first_larger, left_over))
    larger = first_larger <= pp_rank < pp_size - 1
    return start, start + size + larger


def reject_unknown_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise for the first name in `given` that is not `known`, with the nearest known one."""
    for name in given:
        if name not in known:
            raise InputError(f"{what} takes no {name!r}{did_you_mean(name, known)}; it takes: {', '.join(known)}")
