"""`parallelize` and `load`: a plain module or pipeline becomes a parallel one, in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from shardit.config import TIMEOUT_S, DiffusionParallelConfig, config_of, device_kind, idle_chunks
from shardit.core.comm.mesh import Mesh, init_mesh
from shardit.core.comm.sharding_decision import collective_decision
from shardit.core.modules.compiled import refuse_compiled
from shardit.core.modules.hints import Plan
from shardit.core.placement.assignment import Cut, assign_blocks
from shardit.core.placement.roles import ALONE, Roles
from shardit.core.stages.runtime import Runtime
from shardit.diffusion.family import FAMILY
from shardit.diffusion.loading.attention_backends import use_attention_backend
from shardit.diffusion.loading.pipeline import Prepared, load_pipeline, prepare
from shardit.diffusion.loading.start_options import fuse_projections, load_loras, use_vae_options
from shardit.diffusion.roles import denoises, is_vae
from shardit.diffusion.sharding.component_sharding import ComponentSharding, check_earlier, refuse_overlap, sharding_of
from shardit.diffusion.sharding.components import components_of, device_of, refuse_hooks
from shardit.diffusion.sharding.connect import (
    compile_part,
    connect,
    join,
    refuse_shared_blocks,
    shard_model,
    take_compilers,
)
from shardit.diffusion.sharding.decision_text import describe_blocks, describe_layout
from shardit.diffusion.sharding.layout import PipelineLayout, lay_out, warn_unmet
from shardit.errors import InputError, UnsupportedError
from shardit.language.loading.source import named_decoder
from shardit.language.parallel import (
    is_sharded_as_decoder,
    is_split,
    load_decoder,
    parallelize_decoder,
    refuse_uncut_decoder,
)
from shardit.language.preflight import check_decoder_options
from shardit.loading.dtypes import setting
from shardit.parallel.tensor.apply import TensorPlan, plan_components, shard_components
from shardit.parallel_state import set_mesh_of_model
from shardit.settings.model_options import NO_OPTIONS, OPTION_NAMES, ModelOptions, split_model, take_options

if TYPE_CHECKING:
    from shardit.core.placement.assignment import Assignment
    from shardit.loading.safetensors_file import Reads

T = TypeVar("T")


def parallelize(
    module_or_pipeline: T,
    config: DiffusionParallelConfig | None = None,
    *,
    plan: Plan | Mapping[str, Plan] | None = None,
    timeout_s: float = TIMEOUT_S,
    **parallel: Any,
) -> T:
    """Shard a diffusers transformer, or a whole pipeline, over the ranks; works in place and returns the same object.

    Collective: every rank holds the same object and calls this, and later the object, alike; every rank gets the full
    result. The process group is started from the environment (torchrun) if there is none. `plan` overrides what is
    found in a transformer (for a pipeline: one for all, or by component name). `timeout_s` bounds every wait.
    `parallel`: fields of the configuration as keywords, in its place: parallelize(pipe, tensor_parallel_size=2).

    Raises InputError if world size, partition or device do not fit, UnsupportedError if it cannot be done right.
    """
    config = config_of(config, parallel, "parallelize", ("config", "plan", "timeout_s"))
    target: Any = module_or_pipeline
    if is_split(config) and sharding_of(target) is None and is_sharded_as_decoder(target, config):
        return _decoder(target, config, plan, timeout_s)
    modules = components_of(target)
    if modules is None:
        refuse_uncut_decoder(target, config)
        _check_alone(target, config, plan)
    given = modules if modules is not None else {ALONE: target}
    earlier = {name: sharding for name, module in given.items() if (sharding := sharding_of(module)) is not None}
    fresh = {name: module for name, module in given.items() if name not in earlier}
    for name, module in fresh.items():
        refuse_overlap(name or type(module).__name__, module)
    runtime = next((sharding.runtime for sharding in earlier.values()), None)
    mesh = runtime.mesh if runtime else init_mesh(config, device=device_of(given), timeout_s=timeout_s)
    _publish_parallel_state([m for n, m in given.items() if modules is None or denoises(n, m)], config, mesh)
    if len(mesh.replica.ranks) == 1:
        warn_unmet(filter(None, [idle_chunks(config)]), mesh)
        return module_or_pipeline
    compilers: dict[str, Any] = {}

    def check() -> None:
        check_earlier(earlier, config, plan)
        compilers.update(take_compilers(target, fresh))
        refuse_hooks({name or type(target).__name__: module for name, module in fresh.items()}, mesh)

    runtime = runtime or Runtime.of(mesh, split_batch=config.split_batch)
    if modules is None:
        _alone(target, runtime, config, plan if isinstance(plan, Plan) else None, check, bool(earlier))
    else:
        _whole(target, fresh, runtime, config, plan, compilers, check, earlier)
    return module_or_pipeline


def _decoder(model: Any, config: DiffusionParallelConfig, plan: Any, timeout_s: float) -> Any:
    if not hasattr(model, "shardit_decoder"):  # a second call changes nothing
        refuse_overlap(type(model).__name__, model)
    return parallelize_decoder(model, config, plan, timeout_s)


def _check_alone(model: Any, config: DiffusionParallelConfig, plan: Any) -> None:
    """Raise an error for a model outside a pipeline that is no transformer, or is given what only pipelines have."""
    if config.vae_patch_parallel_size > 1:
        raise InputError("vae_patch_parallel_size: a transformer alone has no VAE; give the pipeline, or set it to 1")
    if plan is not None and not isinstance(plan, Plan):
        raise InputError("plan: a single transformer takes one Plan, not one for each component")
    if is_vae(model):
        raise UnsupportedError(
            f"{type(model).__name__} is no transformer, and its methods run whole: give the pipeline that has it"
        )


def _whole(
    pipe: Any,
    modules: Mapping[str, nn.Module],
    runtime: Runtime,
    config: DiffusionParallelConfig,
    plan: Plan | Mapping[str, Plan] | None,
    compilers: Mapping[str, Any],
    check: Callable[[], None],
    earlier: Mapping[str, ComponentSharding],
) -> None:
    """Shard the given components of a pipeline, next to those that were sharded earlier."""

    def decide() -> PipelineLayout | None:
        check()
        if not modules:
            return None
        members = range(len(runtime.mesh.replica.ranks))
        held = [sum(one.bytes_of(member) for one in earlier.values()) for member in members] if earlier else None
        found = lay_out(modules, type(pipe), config, plans=plan, held=held)
        for name in found.assignment.layerwise:
            refuse_compiled(name, modules[name], modules[name].modules())
        for name in found.assignment.cut:
            refuse_compiled(name, modules[name], ())
        return found

    layout = collective_decision(runtime.replica, type(pipe).__name__, decide, describe_layout)
    if layout is None:
        join(pipe, runtime)
        return
    warn_unmet(layout.assignment.unmet, runtime.mesh)
    shard_components(modules, layout.cuts, runtime.mesh)
    connect(pipe, layout, runtime, config)
    for name, compiler in compilers.items():
        compile_part(name, modules[name], compiler)


def _alone(
    model: nn.Module,
    runtime: Runtime,
    config: DiffusionParallelConfig,
    plan: Plan | None,
    check: Callable[[], None],
    done: bool,
) -> None:
    """Shard a transformer outside a pipeline, unless it is sharded already."""
    notes: list[str] = []

    def decide() -> tuple[dict[str, TensorPlan], Cut | None]:
        check()
        if done:
            return {}, None
        refuse_compiled(type(model).__name__, model, ())
        roles = Roles(type(model).__name__, frozenset({ALONE}))
        slices = plan_components({ALONE: model}, roles, runtime.mesh.sizes["tp"], FAMILY)
        cut, note = assign_blocks(model, config, 1, plan, os.environ)
        notes.extend(filter(None, [note]))
        return slices, cut

    slices, cut = collective_decision(runtime.replica, type(model).__name__, decide, describe_blocks)
    if cut is not None:
        warn_unmet(notes, runtime.mesh)
        shard_components({ALONE: model}, slices, runtime.mesh)
        shard_model(model, ALONE, runtime, config, cut, slices.get(ALONE))


def load(
    model: str | os.PathLike[str] = "",  # as if it were required: so a wrong keyword in its place is named
    config: DiffusionParallelConfig | None = None,
    *,
    dtype: Any = None,
    device: str | torch.device | None = None,
    plan: Plan | Mapping[str, Plan] | None = None,
    pipeline_class: str | type | None = None,
    timeout_s: float = TIMEOUT_S,
    model_config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Any:
    """Return the parallel pipeline of a model folder, hub id or "tiny/NAME"; every rank reads only the weights that it
    owns. Of a folder with a model of transformers: that model, over stages and tensor ranks.

    Collective, like `parallelize`. dtype: as `torch_dtype` of `from_pretrained`; None for that of the checkpoint's
    classes. model_config: as for `Omni`. settings: options for loading the model (as for `Omni`), and fields of the
    configuration in its place. Raises InputError/UnsupportedError with one line.
    """
    options = take_options(settings)
    own = ("model", "config", "dtype", "device", "plan", "pipeline_class", "timeout_s", "model_config", *OPTION_NAMES)
    config = config_of(config, settings, "load", own)
    if device is not None:
        device_kind(str(device))
    if not model:
        raise InputError("no model given: name a folder, a hub id or tiny/NAME")
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model must be a folder, a hub id or tiny/NAME, got {model!r:.80}")
    source = named_decoder(model)
    if source is not None:
        given = {"plan": plan, "pipeline_class": pipeline_class, "model_config": model_config}
        check_decoder_options(model, given, options)
        return load_decoder(source, config, dtype, device, timeout_s, options.lora)
    model, options = split_model(model, model_config, options)
    mesh = init_mesh(config, device=device, timeout_s=timeout_s)
    pipe, _, _ = load_parallel(
        model, config, mesh, dtype=dtype, plan=plan, pipeline_class=pipeline_class, options=options
    )
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
    options: ModelOptions = NO_OPTIONS,
    prepared: Prepared | None = None,
) -> tuple[Any, Assignment, Runtime | None]:
    """`load` over a mesh that exists; also returns who owns what, and the runtime (None with one rank). `prepared` is
    what `prepare` gives for these arguments, if that is known."""
    prepared = prepared or prepare(model, pipeline_class, setting(dtype), options)
    layout = lay_out(prepared.modules, prepared.cls, config, max_in_flight=max_in_flight, plans=plan)
    pipe: Any = load_pipeline(prepared, layout.owned(prepared.modules, mesh.member()), device=mesh.device, reads=reads)
    assignment = layout.assignment
    warn_unmet(assignment.unmet, mesh)
    use_vae_options(pipe, options)
    pipe.set_progress_bar_config(disable=mesh.member() != 0)
    for name in assignment.cut:
        use_attention_backend(attention_backend, getattr(pipe, name))
    _publish_parallel_state([getattr(pipe, name) for name in assignment.cut], config, mesh)
    runtime = None
    if len(mesh.replica.ranks) > 1:
        runtime = Runtime.of(mesh, max_in_flight, config.split_batch)
        collective_decision(runtime.replica, type(pipe).__name__, lambda: layout, describe_layout)
        refuse_shared_blocks(pipe, assignment)
        shard_components(pipe.components, layout.cuts, mesh)
        connect(pipe, layout, runtime, config)
    load_loras(pipe, options.lora)
    if options.fuse_projections:
        fuse_projections(pipe, assignment.cut)
    return pipe, assignment, runtime


def _publish_parallel_state(models: Iterable[Any], config: DiffusionParallelConfig, mesh: Mesh) -> None:
    """Set `parallel_config` on the models and the mesh of `parallel_state`, for authors of models."""
    set_mesh_of_model(mesh)
    for model in models:
        model.parallel_config = config
