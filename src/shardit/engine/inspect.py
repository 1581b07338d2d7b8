"""Reports the share of a model on each rank, without reading a weight."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import axis_sizes, coordinates
from shardit.core.placement.assignment import Assignment
from shardit.core.placement.slices import Owned, Slice
from shardit.diffusion.loading.description import Description, describe, describe_configs
from shardit.diffusion.loading.shipped import configurations, shipped
from shardit.diffusion.sharding.layout import lay_out
from shardit.errors import InputError
from shardit.loading.dtypes import Setting, check_components, dtype_of
from shardit.parallel.tensor.apply import describe_plan
from shardit.settings.model_options import model_options

if TYPE_CHECKING:
    import torch


def inspect_model(
    model: str | os.PathLike[str],
    config: DiffusionParallelConfig,
    dtype: Setting = None,
    max_in_flight: int = 1,
    variant: str | None = None,
) -> dict[str, Any]:
    """Return one document with, per rank and component, the blocks (numbers in execution order; of encoders: the
    units), parameters and bytes; and the bytes of the whole model.

    `model` may also be the name or hub id of a configuration that comes with shardit. Bytes are those in the files (for
    such a configuration: in bfloat16), or with `dtype` (one, or one for each component) those in memory in that dtype.
    `variant`: of the weight files, as for `Omni`. Raises the same errors as loading.
    """
    configs = configurations(model, variant)
    found = describe(model, options=model_options(variant=variant)) if configs is None else describe_configs(configs)
    check_components(dtype, found.modules)
    layout = lay_out(found.modules, found.pipeline_class, config, max_in_flight=max_in_flight)
    cuts, assignment = layout.cuts, layout.assignment
    sizes = axis_sizes(config)
    ranks = []
    for rank in range(config.world_size):
        member = rank % len(assignment.stages)
        owns = layout.owned(found.modules, member)
        components = {name: _component(found, assignment, name, member, owned, dtype) for name, owned in owns.items()}
        held = {name: part for name, part in components.items() if part["parameters"]}
        ranks.append({"rank": rank, "coords": coordinates(sizes, rank), "components": held})
    everything = _bytes_of_all(found, assignment, dtype)
    if not everything:
        raise InputError(f"model_index.json of {model} names no component that has weights")
    notes = [line for name, cut in cuts.items() for line in describe_plan(name, found.modules[name], cut)]
    if configs is not None and shipped(os.fspath(model)) is None and dtype is None:
        notes.append("the folder has no weights: bytes are those of bfloat16; dtype (--dtype) says another")
    elif dtype is None and (loaded := _bytes_of_all(found, assignment, "float32")) != everything:
        what = "bfloat16" if configs is not None else "the files"
        notes.append(
            f"bytes are those of {what}; without dtype (--dtype) weights are loaded in float32: "
            f"{loaded / 2**20:,.1f} MiB in all"
        )
    return {"ranks": ranks, "chunks": assignment.chunks, "bytes": everything, "notes": [*assignment.notes, *notes]}


def _bytes_of_all(found: Description, assignment: Assignment, dtype: Setting) -> int:
    """Return the bytes of the whole model."""
    return sum(_component(found, assignment, name, 0, lambda _: True, dtype)["bytes"] for name in found.modules)


def _component(
    found: Description, assignment: Assignment, name: str, member: int, owned: Owned, dtype: Setting
) -> dict[str, Any]:
    blocks = assignment.blocks(name, member)
    stored, kind = found.sizes[name], dtype_of(dtype, name)
    held: dict[int, tuple[torch.Tensor, list[str]]] = {}  # tied tensors count once
    for key, tensor in found.modules[name].state_dict(keep_vars=True).items():
        held.setdefault(id(tensor), (tensor, []))[1].append(key)
    parameters = nbytes = 0
    for tensor, keys in held.values():
        part, whole = owned(keys[0]), tensor.numel()
        if part:
            count = math.prod(part.shape(tensor.shape)) if isinstance(part, Slice) else whole
            parameters += count
            if kind is not None and tensor.is_floating_point():
                nbytes += count * kind.itemsize
            else:
                nbytes += max(stored.get(key, 0) for key in keys) * count // max(whole, 1)
    return {"blocks": blocks, "parameters": parameters, "bytes": nbytes}
