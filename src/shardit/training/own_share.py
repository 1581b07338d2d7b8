"""The weights that a rank of a run loads: those of its blocks, and those outside of blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import Mesh
from shardit.core.modules.blocks import find_blocks, lacks_data
from shardit.core.placement.slices import Owned
from shardit.core.training.schedules import owner_of_chunk
from shardit.loading.weights import names_of_stage
from shardit.training.block_chunks import placing

Share = Callable[[nn.Module], Owned]
"""Gives for a model on meta a predicate over names of parameters: whether this rank loads one."""


def everything(_: nn.Module) -> Owned:
    """The share of a rank that loads all weights."""
    return lambda name: True


def share_of(config: DiffusionParallelConfig | None, schedule: str, mesh: Mesh) -> Share:
    """Return the share of this rank, if blocks run in the order of their registration; None: all ranks load all. If
    they run in another order, the first step sends blocks to the ranks that own them (`core/training/send_blocks.py`).

    Raises InputError and UnsupportedError, when it is called, for a configuration that does not fit a model.
    """
    if config is None or config.pipeline_parallel_size == 1:
        return everything
    return lambda model: _share(model, config, schedule, mesh.pp_rank)


def _share(model: nn.Module, config: DiffusionParallelConfig, schedule: str, stage: int) -> Owned:
    blocks = find_blocks(model)
    if not blocks:
        return lambda name: True
    chunks = placing(model, [block for _, block in blocks], config, schedule)(range(len(blocks)))
    owners = [owner_of_chunk(chunk, config.pipeline_parallel_size, schedule) for chunk in chunks]
    return names_of_stage(model, [name for name, _ in blocks], owners, stage).__contains__


def whole_note(name: str, model: nn.Module, share: Share) -> list[str]:
    """Return a line for the user if a loaded model is whole though its blocks are on several ranks: files may hold its
    tensors in a form that is converted only together."""
    if share is everything or lacks_data(model):
        return []
    return [f"{name}: its files cannot be read in part, so each rank holds it whole until the first step"]
