"""Connects the sharded components of a pipeline, and the pipeline itself, to the other ranks, in place."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.p2p import Comm
from shardit.core.components.layerwise import cut_layerwise
from shardit.core.components.owned import make_owned
from shardit.core.modules.absent import mark_absent, refuse_partial_states
from shardit.core.modules.blocks import find_blocks
from shardit.core.modules.compiled import BLOCKWISE, compile_call, unwrap, unwrap_parts
from shardit.core.modules.hooks import add_libraries
from shardit.core.modules.patching import plain_class, subclass_in_place
from shardit.core.placement.assignment import Assignment, Cut
from shardit.core.stages.entry import entry_of, pipeline_entry
from shardit.core.stages.overlap import overlap
from shardit.core.stages.runtime import Runtime
from shardit.core.stages.transformer_stages import TransformerStages, stage
from shardit.diffusion.family import ADAPTER_SCALES, FAMILY, LIBRARIES, look_up_plain_blocks, wrap_attention_back_ends
from shardit.diffusion.roles import denoises, left_whole
from shardit.diffusion.sharding.adapters import collective_fuse, local_set_device
from shardit.diffusion.sharding.callbacks import end_callbacks, interrupt_members, shared_callback
from shardit.diffusion.sharding.component_sharding import ComponentSharding, sharding_of
from shardit.diffusion.sharding.components import (
    BEFORE_PARALLELIZE,
    OFFLOAD,
    SAVE,
    components_of,
    modules_of,
    outermost,
    refuse_methods,
    refused,
    shared_tensors,
    unpicklable,
)
from shardit.diffusion.sharding.configurations import Configurations
from shardit.diffusion.sharding.layout import PipelineLayout
from shardit.errors import UnsupportedError
from shardit.parallel.sequence.choose import shard_tokens
from shardit.parallel.tensor.adapters import pipeline_members
from shardit.parallel.tensor.apply import TensorPlan
from shardit.parallel.vae.tiles import shard_tiles

log = logging.getLogger(__name__)


def connect(
    pipe: Any,
    layout: PipelineLayout,
    runtime: Runtime,
    config: DiffusionParallelConfig,
) -> None:
    """Make the assigned components of a pipeline, loaded in whole or in part, and the pipeline itself parallel.
    Components that it shares with another pipeline are already parallel, over the same runtime."""
    add_libraries(FAMILY.libraries)
    cuts, assignment = layout.cuts, layout.assignment
    shared = shared_tensors(components_of(pipe) or {})
    for name, cut in assignment.cut.items():
        shard_model(getattr(pipe, name), name, runtime, config, cut, cuts.get(name), assignment, shared)
    for name, owner in assignment.owned.items():
        comm, width = _owner_ranks(name, assignment, runtime)
        small, cut = assignment.small.get(name, ()), cuts[name].cuts if name in cuts else ()
        if name in assignment.tiles:
            shard_tiles(getattr(pipe, name), runtime.replica, assignment.tiles[name], small, shared, runtime.turn)
        else:
            make_owned(getattr(pipe, name), comm, owner // width, small, cut, shared, runtime.turn)
    for name, found in assignment.layerwise.items():
        comm, width = _owner_ranks(name, assignment, runtime)
        owners, cut = [owner // width for owner in found.owners], cuts[name].cuts if name in cuts else ()
        cut_layerwise(getattr(pipe, name), comm, found.units, owners, cut, shared, runtime.turn)
    for name in (*assignment.owned, *assignment.layerwise):
        part = getattr(pipe, name)
        part.shardit_boundary.install_on(vars(pipe).values())
        part.shardit_boundary.libraries = LIBRARIES.own
        refuse_methods(part, name, runtime.mesh)
        mark_absent(part, torch.device(runtime.mesh.device), LIBRARIES)
        ComponentSharding(name, part, config, runtime, False, None, assignment, cuts.get(name))
        if name in assignment.owned and runtime.mesh.rank == 0 and (why := left_whole(part)):
            log.warning("%s is whole on one rank: %s", name, why)
    join(pipe, runtime)


def refuse_shared_blocks(pipe: Any, assignment: Assignment) -> None:
    """Raise UnsupportedError if a partly loaded component uses blocks of a transformer that are on other stages: they
    were not read here."""
    shared = shared_tensors(components_of(pipe) or {})
    for name, cut in assignment.cut.items() if len(set(assignment.stages)) > 1 else ():
        for key, parameter in getattr(pipe, name).named_parameters():
            others = [other for other in shared.get(id(parameter), ()) if other != name]
            if others and key.startswith(tuple(f"{block}." for block in cut.blocks)):
                raise UnsupportedError(
                    f"{others[0]} uses {key} of {name}, which is on one of the stages only: load the pipeline with "
                    "diffusers and parallelize it, or use pipeline_parallel_size=1"
                )


def shard_model(
    model: nn.Module,
    name: str,
    runtime: Runtime,
    config: DiffusionParallelConfig,
    cut: Cut,
    slices: TensorPlan | None = None,
    assignment: Assignment | None = None,
    shared: Collection[int] = (),
) -> None:
    """Make one transformer parallel, in place. `shared`: ids of the tensors that another component also has."""
    add_libraries(FAMILY.libraries)
    mesh = runtime.mesh
    # Stages also implement the guidance axis: a call run by another replica is one whose result arrives later.
    pieces = mesh.pp_size > 1 or mesh.sizes["cfg"] > 1
    stages = (lambda: stage(model, runtime, cut, shared, ADAPTER_SCALES)) if pieces else None
    overlaps = not pieces and (cut.plan is None or cut.plan.overlap)
    if "sp" in mesh.axes:
        wrap_attention_back_ends()
        way = shard_tokens(model, mesh, stages, cut.plan, cut.blocks)
        overlaps = overlaps and not way.by_hand  # a result may then have another shape in each call
    elif stages is not None:
        stages()
    if overlaps and mesh.axes.keys() & {"sp", "tp"}:
        overlap(model, runtime, ADAPTER_SCALES, alone=cut.plan is not None)
    look_up_plain_blocks()
    refuse_methods(model, name or type(model).__name__, mesh)
    found: TransformerStages | None = getattr(model, "shardit_stages", None)
    staged = [] if found is None or mesh.pp_size == 1 else [block for block, _ in found.cut.blocks]
    refuse_partial_states(model, [*staged, *(slices.cuts if slices else ())], LIBRARIES)
    mark_absent(model, torch.device(mesh.device), LIBRARIES)
    sharding = ComponentSharding(name, model, config, runtime, True, cut.plan, assignment, slices)
    entry_of(model).compare_inputs(runtime, sharding.begin, sharding.end)


def join(pipe: Any, runtime: Runtime) -> None:
    """Give a pipeline with sharded components its parallel methods, unless it has them already."""
    if getattr(type(pipe), "shardit_runtime", None) is runtime:
        return
    _patch_pipeline_constructors()
    cls, device = type(pipe), runtime.mesh.device

    def to(self: Any, *args: Any, silence_dtype_warnings: bool = False, **kwargs: Any) -> Any:
        # The warnings are of diffusers' method, which this one replaces; modules do not take the argument.
        for component in (components_of(self) or {}).values():
            component.to(*args, **kwargs)
        return self

    share = functools.partial(shared_callback, begin=begin_parts, end=update_parts)
    call = pipeline_entry(cls.__call__, runtime, begin_parts, Configurations(), share, end_parts)
    functools.update_wrapper(call, cls.__call__)  # tools read the signature
    members = {"__call__": call, "to": to, "device": property(lambda self: device), "__reduce_ex__": unpicklable(cls)}
    members["_execution_device"] = property(lambda self: device)
    members.update({name: refused(name) for name in (*OFFLOAD, *SAVE, *BEFORE_PARALLELIZE)})
    if hasattr(cls, "fuse_lora"):
        members["fuse_lora"] = collective_fuse(
            cls.fuse_lora, runtime.replica, lambda self: (components_of(self) or {}).values()
        )
    if hasattr(cls, "set_lora_device"):
        members["set_lora_device"] = local_set_device(cls.set_lora_device)
    found = {id(part): sharding_of(part) for part in (components_of(pipe) or {}).values()}
    slices = {key: one.slices for key, one in found.items() if one is not None and one.slices is not None}
    members.update(pipeline_members(cls, slices))
    members = {name: member for name, member in members.items() if hasattr(cls, name)}
    subclass_in_place(pipe, {**members, **interrupt_members(cls), "shardit_runtime": runtime})


def begin_parts(pipe: Any) -> dict[str, Any]:
    """Check a pipeline's parts before its call, and return the state that must be equal on all ranks. Raises
    UnsupportedError if a part was not sharded with it, or was replaced since."""
    modules, alike = modules_of(pipe) or {}, {}
    for name, part in modules.items():
        part, compiler = unwrap(part)
        sharding = sharding_of(part)
        if sharding is not None and compiler is not None:
            setattr(pipe, name, part)
            compile_part(name, part, compiler)
        if sharding is None:
            if name not in outermost(modules):  # a part of another component
                continue
            raise UnsupportedError(
                f"{name} was put into the pipeline after parallelize, so every rank would run all of it: call "
                "parallelize on the pipeline once more, with the same configuration"
            )
        if sharding.runtime is not pipe.shardit_runtime:
            raise UnsupportedError(
                f"{name} belongs to a pipeline that was sharded separately, and is scheduled only with that one: make "
                "the pipelines that share components before parallelize"
            )
        alike.update(sharding.begin())
    return alike


def end_parts(pipe: Any) -> None:
    """Finish a call of a pipeline, also after an error."""
    end_callbacks(pipe)
    update_parts(pipe)


def update_parts(pipe: Any) -> None:
    """Record the settings of a pipeline's parts after calls, so that later changes are relative to them."""
    for part in (modules_of(pipe) or {}).values():
        sharding = sharding_of(part)
        if sharding is not None:
            sharding.end()


def take_compilers(target: Any, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Remove wrappers of torch.compile around components and their parts, in place, also in `modules`. Return the
    compilers of the components by name, for `compile_part`."""
    compilers = {}
    for name, module in list(modules.items()):
        part, compiler = unwrap(module)
        if compiler is not None and module is target:
            raise UnsupportedError(
                f"{type(part).__name__} is wrapped by torch.compile: parallelize the model itself, and {BLOCKWISE}"
            )
        if compiler is not None:
            compilers[name], modules[name] = compiler, part
            setattr(target, name, part)
        unwrap_parts(part)
    return compilers


def compile_part(name: str, part: Any, compiler: Any) -> None:
    """Compile a component of a pipeline that torch.compile had wrapped: a denoiser block by block, since its forward
    waits for other ranks between blocks; any other component whole, on its owner."""
    if denoises(name, part):
        for _, block in find_blocks(part):
            compile_call(block, compiler)
        log.info("%s: torch.compile compiles each of its blocks separately", name)
    elif hasattr(part, "shardit_layerwise"):
        log.warning("%s is not compiled: its layers are on several ranks", name)
    else:
        compile_call(part, compiler)


@functools.cache
def _patch_pipeline_constructors() -> None:
    """Make later pipelines of diffusers that use sharded components (by `from_pipe` or constructors) parallel."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    own_register, own_from_pipe = DiffusionPipeline.register_modules, DiffusionPipeline.from_pipe.__func__

    @functools.wraps(own_register)
    def register_modules(self: Any, **kwargs: Any) -> None:
        own_register(self, **kwargs)
        found = [sharding_of(part) for part in kwargs.values() if isinstance(part, nn.Module)]
        runtimes = {id(sharding.runtime): sharding.runtime for sharding in found if sharding is not None}
        if found and None not in found and len(runtimes) == 1:
            join(self, *runtimes.values())

    @functools.wraps(own_from_pipe)
    def from_pipe(cls: Any, pipeline: Any, **kwargs: Any) -> Any:
        # It reuses components of exactly the expected class; the class of a sharded component is a subclass.
        expected, types = cls._get_signature_keys(cls)[0], cls._get_signature_types()
        for name, part in pipeline.components.items():
            if sharding_of(part) is not None and name in expected and plain_class(part) in types.get(name, ()):
                kwargs.setdefault(name, part)
        return own_from_pipe(cls, pipeline, **kwargs)

    DiffusionPipeline.register_modules = register_modules
    patched: Any = DiffusionPipeline
    patched.from_pipe = classmethod(from_pipe)


def _owner_ranks(name: str, assignment: Assignment, runtime: Runtime) -> tuple[Comm, int]:
    """Return the ranks that may own a component, and the number of tensor ranks that own it together."""
    return (runtime.peers, assignment.tp) if name in assignment.sliced else (runtime.replica, 1)
