"""A causal language model becomes one over stages, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from shardit.core.decoder.link import Link
from shardit.core.decoder.stages import DecoderStages
from shardit.core.modules.blocks import drop_blocks, find_blocks
from shardit.core.modules.patching import fixed_place, subclass_in_place
from shardit.core.placement.partition import balanced_cuts
from shardit.core.runtime.request_loop import Program
from shardit.core.stages.runtime import Runtime
from shardit.errors import InputError, UnsupportedError
from shardit.language.caches import StageCaches
from shardit.language.generate import members_of


def blocks_of(model: Any) -> list[tuple[str, nn.Module]]:
    """Embedding, layers and head of a causal language model, in the order in which a forward runs them."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = find_blocks(model)
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no list of layers, and cannot be cut into stages")
    embedding, head = (
        [one] if one is not None else [] for one in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    return [*((names[id(one)], one) for one in embedding), *layers, *((names[id(one)], one) for one in head)]


def owners_of(
    model: Any, blocks: Sequence[tuple[str, nn.Module]], stages: int, partition: Sequence[int] | None
) -> list[int]:
    """The stage of each block: contiguous, with even bytes, or layers per stage as `partition` says. Embedding and head
    count like layers: a vocabulary may be the largest part of a model.

    Raises InputError where the partition does not fit."""
    layers = {name for name, _ in find_blocks(model)}
    if partition is not None:
        if len(partition) != stages or sum(partition) != len(layers):
            raise InputError(
                f"layer_partition {list(partition)}: {type(model).__name__} has {len(layers)} layers and "
                f"pipeline_parallel_size is {stages}; give {stages} numbers with that sum"
            )
        of_layers = iter([stage for stage, count in enumerate(partition) for _ in range(count)])
        before, owners = 0, []
        for name, _ in blocks:
            before = next(of_layers) if name in layers else (stages - 1 if owners else 0)
            owners.append(before)
        return owners
    costs = [float(sum(p.numel() * p.element_size() for p in block.parameters())) for _, block in blocks]
    return [stage for stage, count in enumerate(balanced_cuts(costs, stages)) for _ in range(count)]


def over_stages(model: Any, runtime: Runtime, partition: Sequence[int] | None = None) -> DecoderStages:
    """Cut a causal language model in place: keep the blocks of this rank, intercept the calls of all."""
    blocks = blocks_of(model)
    owners = owners_of(model, blocks, runtime.mesh.pp_size, partition)
    rank, device = runtime.comm.rank, torch.device(runtime.mesh.device)
    caches = StageCaches(owners, rank)
    stages = DecoderStages(model, Link(runtime.comm, runtime.turns.let_others), blocks, owners, caches)
    drop_blocks(model, blocks, owners, rank, None)
    stages.install()
    members = {
        **members_of(model, stages, runtime),
        "device": property(lambda self: device),
        "to": fixed_place(type(model).to, device),
        "shardit_stages": property(lambda self: stages),
    }
    subclass_in_place(model, members)
    return stages


def at_once(runtime: Runtime, functions: Sequence[Callable[[], Any]], seeds: Sequence[int]) -> list[Any]:
    """What functions return that call models over these stages: while one waits for a message, others compute. Raises
    what one of them raises."""
    programs = [Program(function, seed) for function, seed in zip(functions, seeds, strict=True)]
    for program in runtime.turns.run(iter(programs), len(programs)):
        if program.error is not None:
            raise program.error
    return [program.value for program in programs]
