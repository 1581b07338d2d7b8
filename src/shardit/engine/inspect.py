"""What each rank would hold of a model, without reading a weight."""

from __future__ import annotations

import math
import os
from typing import Any

from ..config import DiffusionParallelConfig
from ..core.assign import Assignment, assign
from ..core.mesh import axis_sizes, coordinates
from ..core.slices import Owned, Slice
from ..loading import Description, describe
from ..loading.dtypes import as_dtype
from ..parallel.tensor import describe_plan, owned_slices, plan_components


def inspect_model(
    model: str | os.PathLike[str], config: DiffusionParallelConfig, dtype: str | None = None, max_in_flight: int = 1
) -> dict[str, Any]:
    """One document: per rank and component the blocks (numbers in execution order), parameters and bytes.

    Bytes are those in the files, or with `dtype` those in memory of that dtype. Raises what loading would raise.
    """
    found = describe(model)
    assignment = assign(found.modules, found.pipeline_class, config, max_in_flight=max_in_flight, environ=os.environ)
    sizes = axis_sizes(config)
    cuts = plan_components(found.modules, sizes["tp"])
    ranks = []
    for rank in range(config.world_size):
        coords = coordinates(sizes, rank)
        owns = {
            name: owned_slices(assignment.owns(name, coords["pp"]), cuts.get(name), coords["tp"])
            for name in found.modules
        }
        components = {
            name: _component(found, assignment, name, coords["pp"], owned, dtype) for name, owned in owns.items()
        }
        held = {name: part for name, part in components.items() if part["parameters"]}
        ranks.append({"rank": rank, "coords": coords, "components": held})
    notes = [line for name, cut in cuts.items() for line in describe_plan(name, found.modules[name], cut)]
    return {"ranks": ranks, "chunks": assignment.chunks, "notes": [*assignment.notes, *notes]}


def _component(
    found: Description, assignment: Assignment, name: str, stage: int, owned: Owned, dtype: str | None
) -> dict[str, Any]:
    cut = assignment.cut.get(name)
    blocks = [i for i, owner in enumerate(cut.placement.owners()) if owner == stage] if cut else []
    stored, kind = found.sizes[name], as_dtype(dtype)
    parameters = nbytes = 0
    for key, tensor in found.modules[name].state_dict().items():
        part = owned(key)
        if not part:
            continue
        whole = tensor.numel()
        held = math.prod(part.shape(tensor.shape)) if isinstance(part, Slice) else whole
        parameters += held
        if kind is not None and tensor.is_floating_point():
            nbytes += held * kind.itemsize
        else:
            nbytes += stored.get(key, 0) * held // max(whole, 1)
    return {"blocks": blocks, "parameters": parameters, "bytes": nbytes}
