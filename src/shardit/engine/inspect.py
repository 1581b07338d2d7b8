"""What each rank would hold of a model, without reading a weight."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..config import DiffusionParallelConfig
from ..core.assign import Assignment, assign
from ..core.mesh import axis_sizes, coordinates
from ..loading import Description, describe
from ..loading.dtypes import as_dtype

if TYPE_CHECKING:
    import torch


def inspect_model(
    model: str | os.PathLike[str], config: DiffusionParallelConfig, dtype: str | None = None, max_in_flight: int = 1
) -> dict[str, Any]:
    """One document: per rank and component the blocks (numbers in execution order), parameters and bytes.

    Bytes are those in the files, or with `dtype` those in memory of that dtype. Raises what loading would raise.
    """
    found = describe(model)
    assignment = assign(found.modules, found.pipeline_class, config, max_in_flight=max_in_flight, environ=os.environ)
    sizes = axis_sizes(config)
    ranks = []
    for rank in range(config.world_size):
        coords = coordinates(sizes, rank)
        member = rank % len(assignment.stages)
        components = {name: _component(found, assignment, name, member, dtype) for name in found.modules}
        held = {name: part for name, part in components.items() if part["parameters"]}
        ranks.append({"rank": rank, "coords": coords, "components": held})
    return {"ranks": ranks, "chunks": assignment.chunks, "notes": list(assignment.notes)}


def _component(found: Description, assignment: Assignment, name: str, member: int, dtype: str | None) -> dict[str, Any]:
    owns, stage = assignment.owns(name, member), assignment.stages[member]
    held: dict[int, tuple[torch.Tensor, list[str]]] = {}  # tied ones count once
    for key, tensor in found.modules[name].state_dict(keep_vars=True).items():
        if owns(key):
            held.setdefault(id(tensor), (tensor, []))[1].append(key)
    cut = assignment.cut.get(name)
    blocks = [i for i, owner in enumerate(cut.placement.owners()) if owner == stage] if cut else []
    stored = found.sizes[name]
    kind = as_dtype(dtype)
    nbytes = sum(
        tensor.numel() * kind.itemsize
        if kind is not None and tensor.is_floating_point()
        else max(stored.get(key, 0) for key in keys)
        for tensor, keys in held.values()
    )
    return {"blocks": blocks, "parameters": sum(t.numel() for t, _ in held.values()), "bytes": nbytes}
