"""`parallelize` and `load`: a plain module or pipeline becomes a parallel one, in place."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .callbacks import calling, interrupt_members
from .components import OFFLOAD, SAVE, components_of, device_of, guard, refuse_hooks, refused
from .config import DiffusionParallelConfig, config_of
from .core.assign import Assignment, Cut, assign, assign_blocks, denoises
from .core.comm import Comm
from .core.mesh import Mesh, init_mesh
from .core.overlap import overlap
from .core.plan import Plan
from .core.relay import relay
from .core.remote import own
from .core.sites import swap_class
from .core.slices import Owned
from .core.stages import Runtime, stage
from .errors import InputError
from .models.back_ends import use_attention_backend
from .parallel.spread import spread_tokens
from .parallel.tensor import ALONE, TensorPlan, owned_slices, owners_of_wholes, plan_components, shard_components
from .parallel.tensor_adapters import pipeline_members
from .parallel.tiles import spread_tiles
from .parallel_state import set_mesh_of_model

if TYPE_CHECKING:
    from .loading import Reads

T = TypeVar("T")


def parallelize(
    module_or_pipeline: T,
    config: DiffusionParallelConfig | None = None,
    *,
    plan: Plan | Mapping[str, Plan] | None = None,
    timeout_s: float = 600,
    **parallel: Any,
) -> T:
    """Spread a diffusers transformer, or a whole pipeline, over the ranks; works in place and returns the same object.

    Collective: every rank holds the same object and calls this, and later the object, alike; every rank gets the full
    result. The process group is started from the environment (torchrun) if there is none. `plan` overrides what is
    found in a transformer (for a pipeline: one for all, or by component name). `timeout_s` bounds every wait.
    `parallel`: fields of the configuration as keywords, in its place: parallelize(pipe, tensor_parallel_size=2).

    Raises InputError where world size, partition or device do not fit, UnsupportedError where it cannot be done right.
    """
    config = config_of(config, parallel, "parallelize", ("config", "plan", "timeout_s"))
    target: Any = module_or_pipeline
    modules = components_of(target)
    if modules is None and config.vae_patch_parallel_size > 1:
        raise InputError("vae_patch_parallel_size: a transformer alone has no VAE; give the pipeline, or set it to 1")
    device = device_of(modules or {ALONE: target})
    mesh = init_mesh(config, device=device, timeout_s=timeout_s)
    denoisers = [target] if modules is None else [m for n, m in modules.items() if denoises(n, m)]
    _tell(denoisers, config, mesh)
    if len(mesh.replica.ranks) == 1:
        return module_or_pipeline
    name = type(target).__name__
    refuse_hooks(modules or {name: target}, mesh)
    if modules is None:
        if plan is not None and not isinstance(plan, Plan):
            raise InputError("plan: a single transformer takes one Plan, not one for each component")
        runtime = Runtime.of(mesh, split_batch=config.split_batch)
        shard_components({ALONE: target}, plan_components({ALONE: target}, mesh.sizes["tp"]), mesh)
        cut, _ = assign_blocks(target, config, 1, plan, os.environ)
        _spread(target, runtime, cut)
        guard(target, name, mesh)
        return module_or_pipeline
    cuts = plan_components(modules, mesh.sizes["tp"], owners_of_wholes(config))
    assignment = assign(modules, type(target), config, plans=plan, sliced=cuts.keys(), environ=os.environ)
    shard_components(modules, cuts, mesh)
    connect(target, assignment, Runtime.of(mesh, split_batch=config.split_batch), cuts)
    return module_or_pipeline


def load(
    model: str | os.PathLike[str],
    config: DiffusionParallelConfig | None = None,
    *,
    dtype: Any = None,
    device: str | torch.device | None = None,
    plan: Plan | Mapping[str, Plan] | None = None,
    pipeline_class: str | type | None = None,
    timeout_s: float = 600,
    **parallel: Any,
) -> Any:
    """The parallel pipeline of a model folder, hub id or "tiny/NAME"; every rank reads only the weights that it owns.

    Collective, like `parallelize`. dtype: None as the checkpoint's classes have it, else what `torch_dtype` means to
    `from_pretrained`. parallel: fields of the configuration as keywords, in its place. Raises
    InputError/UnsupportedError with one line.
    """
    config = config_of(config, parallel, "load", ("config", "dtype", "device", "plan", "pipeline_class", "timeout_s"))
    mesh = init_mesh(config, device=device, timeout_s=timeout_s)
    pipe, _, _ = load_parallel(model, config, mesh, dtype=dtype, plan=plan, pipeline_class=pipeline_class)
    return pipe


def load_parallel(
    model: str | os.PathLike[str],
    config: DiffusionParallelConfig,
    mesh: Mesh,
    *,
    dtype: Any = None,
    plan: Plan | Mapping[str, Plan] | None = None,
    pipeline_class: str | type | None = None,
    max_in_flight: int = 1,
    reads: Reads | None = None,
    attention_backend: str | None = None,
) -> tuple[Any, Assignment, Runtime | None]:
    """`load` over a mesh that exists; also returns who owns what, and the runtime (None with one rank)."""
    from .loading import load_pipeline

    found: list[Assignment] = []
    cuts: dict[str, TensorPlan] = {}

    def place(modules: dict[str, nn.Module], cls: type) -> dict[str, Owned]:
        cuts.update(plan_components(modules, mesh.sizes["tp"], owners_of_wholes(config)))
        found.append(
            assign(
                modules, cls, config, max_in_flight=max_in_flight, plans=plan, sliced=cuts.keys(), environ=os.environ
            )
        )
        owns = {name: found[0].owns(name, mesh.member()) for name in modules}
        return {name: owned_slices(owns[name], cuts.get(name), mesh.coords["tp"]) for name in modules}

    pipe: Any = load_pipeline(
        model, dtype=dtype, device=mesh.device, place=place, pipeline_class=pipeline_class, reads=reads
    )
    pipe.set_progress_bar_config(disable=mesh.member() != 0)
    for name in found[0].cut:
        use_attention_backend(attention_backend, getattr(pipe, name))
    _tell([getattr(pipe, name) for name in found[0].cut], config, mesh)
    if len(mesh.replica.ranks) == 1:
        return pipe, found[0], None
    runtime = Runtime.of(mesh, max_in_flight, config.split_batch)
    shard_components(pipe.components, cuts, mesh)
    connect(pipe, found[0], runtime, cuts)
    return pipe, found[0], runtime


def connect(pipe: Any, assignment: Assignment, runtime: Runtime, cuts: Mapping[str, TensorPlan]) -> None:
    """Turn the components of a pipeline, loaded in whole or in part, into parallel ones, and the pipeline with them."""
    for name, cut in assignment.cut.items():
        _spread(getattr(pipe, name), runtime, cut)
    for name, owner in assignment.owned.items():
        comm, width = _among(name, assignment, runtime)
        small, cut = assignment.small.get(name, ()), cuts[name].cuts if name in cuts else ()
        if name in assignment.tiles:
            spread_tiles(getattr(pipe, name), runtime.replica, assignment.tiles[name], small)
        else:
            own(getattr(pipe, name), comm, owner // width, small, cut)
    for name, found in assignment.relayed.items():
        comm, width = _among(name, assignment, runtime)
        owners, cut = [owner // width for owner in found.owners], cuts[name].cuts if name in cuts else ()
        relay(getattr(pipe, name), comm, found.units, owners, cut)
    for name in (*assignment.cut, *assignment.owned, *assignment.relayed):
        guard(getattr(pipe, name), name, runtime.mesh)
    _swap_pipeline(pipe, runtime, cuts)


def _tell(models: Iterable[Any], config: DiffusionParallelConfig, mesh: Mesh) -> None:
    """Let authors of models get at degrees and groups: `parallel_config` on the models, and `parallel_state`."""
    set_mesh_of_model(mesh)
    for model in models:
        model.parallel_config = config


def _among(name: str, assignment: Assignment, runtime: Runtime) -> tuple[Comm, int]:
    """The ranks among which a component has owners, and how many neighbours own it together."""
    return (runtime.peers, assignment.tp) if name in assignment.sliced else (runtime.replica, 1)


def _spread(model: nn.Module, runtime: Runtime, cut: Cut) -> None:
    """Make one transformer parallel, in place."""
    mesh = runtime.mesh
    # Stages also carry the guidance axis: a call that another replica runs is one whose result arrives later.
    pieces = mesh.pp_size > 1 or mesh.sizes["cfg"] > 1
    stages = (lambda: stage(model, runtime, cut.placement, cut.plan)) if pieces else None
    overlaps = not pieces and (cut.plan is None or cut.plan.overlap)
    if "sp" in mesh.axes:
        way = spread_tokens(model, mesh, stages, cut.plan)
        overlaps = overlaps and not way.by_hand  # a result may then have another shape in each call
    elif stages is not None:
        stages()
    if overlaps and mesh.axes.keys() & {"sp", "tp"}:
        overlap(model, runtime)


def _swap_pipeline(pipe: Any, runtime: Runtime, cuts: Mapping[str, TensorPlan]) -> None:
    """Give a pipeline whose components are spread the methods that go with it; its `shardit_alike` does so to another
    pipeline over the same components."""
    cls, device = type(pipe), runtime.mesh.device

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        for component in (components_of(self) or {}).values():
            component.to(*args, **kwargs)
        return self

    call = functools.wraps(cls.__call__)(calling(cls.__call__, runtime))  # tools read the signature
    members = {"__call__": call, "to": to, "device": property(lambda self: device)}
    members["_execution_device"] = property(lambda self: device)
    members.update({name: refused(name) for name in (*OFFLOAD, *SAVE)})
    members.update(pipeline_members(cls, {id(getattr(pipe, name)): plan for name, plan in cuts.items()}))
    members = {name: member for name, member in members.items() if hasattr(cls, name)}
    members["shardit_alike"] = staticmethod(lambda other: _swap_pipeline(other, runtime, cuts))
    swap_class(pipe, {**members, **interrupt_members(cls)})
