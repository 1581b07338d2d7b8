"""What each rank would hold of a model, without reading a weight."""

from __future__ import annotations

import os
from typing import Any

from ..config import DiffusionParallelConfig
from ..core.assign import Assignment, assign
from ..core.mesh import axis_sizes, coordinates
from ..loading import Description, describe
from ..loading.dtypes import as_dtype


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
        components = {name: _component(found, assignment, name, coords["pp"], dtype) for name in found.modules}
        held = {name: part for name, part in components.items() if part["parameters"]}
        ranks.append({"rank": rank, "coords": coords, "components": held})
    return {"ranks": ranks, "chunks": assignment.chunks, "notes": list(assignment.notes)}


def _component(found: Description, assignment: Assignment, name: str, stage: int, dtype: str | None) -> dict[str, Any]:
    owns = assignment.owns(name, stage)
    held = {key: tensor for key, tensor in found.modules[name].state_dict().items() if owns(key)}
    cut = assignment.cut.get(name)
    blocks = [i for i, owner in enumerate(cut.placement.owners()) if owner == stage] if cut else []
    stored = found.sizes[name]
    kind = as_dtype(dtype)
    nbytes = sum(
        tensor.numel() * kind.itemsize if kind is not None and tensor.is_floating_point() else stored.get(key, 0)
        for key, tensor in held.items()
    )
    return {"blocks": blocks, "parameters": sum(t.numel() for t in held.values()), "bytes": nbytes}
