"""A causal language model becomes one over stages, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shardit.core.comm.mesh import Mesh
from shardit.core.comm.p2p import Comm
from shardit.core.decoder.link import Link
from shardit.core.decoder.stages import DecoderStages
from shardit.core.modules.blocks import drop_blocks, find_blocks
from shardit.core.modules.patching import fixed_place, subclass_in_place
from shardit.errors import UnsupportedError
from shardit.language.caches import StageCaches
from shardit.language.generate import members_of


def blocks_of(model: Any) -> list[tuple[str, nn.Module]]:
    """Embedding, layers and head, in the order in which a forward runs them."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = find_blocks(model)
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no list of layers")
    ends = [[(names[id(one)], one)] if one is not None else [] for one in (embedding, head)]
    return [*ends[0], *layers, *ends[1]]


def owners_of(blocks: Sequence[tuple[str, nn.Module]], stages: int) -> list[int]:
    """The stage of each block: contiguous, with even bytes."""
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for _, block in blocks]
    total, done, owners = sum(sizes) or 1, 0, []
    for size in sizes:
        owners.append(min(stages - 1, int((done + size / 2) * stages / total)))
        done += size
    return owners


def over_stages(model: Any, mesh: Mesh, owners: Sequence[int] | None = None) -> DecoderStages:
    """Cut a model in place: keep the blocks of this rank, intercept the calls of all."""
    comm = Comm(mesh.pipeline)
    blocks = blocks_of(model)
    owners = list(owners or owners_of(blocks, mesh.pp_size))
    caches = StageCaches([block for _, block in blocks], owners, comm.rank)
    stages = DecoderStages(model, Link(comm), blocks, owners, caches)
    drop_blocks(model, blocks, owners, comm.rank, None)
    stages.install()
    members = {
        **members_of(model, stages.link),
        "device": property(lambda self: torch.device(mesh.device)),
        "to": fixed_place(type(model).to, mesh.device),
        "shardit_stages": property(lambda self: stages),
    }
    subclass_in_place(model, members)
    return stages
