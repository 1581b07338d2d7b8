"""Builds a real diffusers pipeline with only this rank's part of the weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shardit.diffusion.loading.schedulers import changed_scheduler, has_default, wants_scheduler
from shardit.diffusion.roles import denoises
from shardit.errors import InputError, first_line
from shardit.loading import index
from shardit.loading.checkpoint import Checkpoint, check_variant
from shardit.loading.dtypes import Setting, check_components, dtype_of
from shardit.loading.index import Component, damaged_json
from shardit.loading.meta import build
from shardit.loading.model_lists import SeveralWeights, is_several
from shardit.loading.quiet import quiet
from shardit.loading.safetensors_file import Reads
from shardit.loading.single_file import Original, OriginalText, holds, load_original, loadable, text_encoder
from shardit.loading.source import ModelSource, locate
from shardit.loading.transformers_model import load_transformers
from shardit.loading.weights import Owned, load_module
from shardit.settings.model_options import NO_OPTIONS, WHOLE, ModelOptions, check_single_files

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import nn


@dataclass(frozen=True)
class Prepared:
    """A pipeline before its weights are loaded: its location, its class, the components that the class takes,
    checkpoint and module on meta of the models among them; and the requested dtypes and options."""

    source: ModelSource
    cls: type[Any]
    parts: dict[str, Component]
    checkpoints: dict[str, Checkpoint]
    modules: dict[str, nn.Module]
    dtype: Setting
    options: ModelOptions


def prepare(
    model: str | os.PathLike,
    pipeline_class: str | type | None = None,
    dtype: Setting = None,
    options: ModelOptions = NO_OPTIONS,
    *,
    configs_only: bool = False,
) -> Prepared:
    """Prepare the pipeline of a model folder, hub id or "tiny/NAME" as far as possible without reading weights.

    dtype: one dtype, None (default of diffusers and the configs), or a dict of these by component, with "default" for
    the others (without it: float32). options: choose the files and the scheduler; adapters and VAE settings are left to
    the caller. Raises InputError and UnsupportedError, one line each.

    configs_only: the folder has nothing but configurations, so there are no checkpoints.
    """
    from transformers import PreTrainedModel

    source = locate(model, weights=False, variant=options.variant)
    wanted = pipeline_class
    cls = wanted if isinstance(wanted, type) else index.pipeline_class(source.folder, wanted)
    accepted = inspect.signature(cls.__init__).parameters
    found = index.components(source.folder).items()
    parts = {
        name: part
        for name, part in found
        if name in accepted
        and not part.absent
        and not index.is_left_to_class(part, source.folder, accepted, cls._optional_components)
    }
    if not configs_only:
        index.check_complete(source.folder, cls.__name__, accepted, cls._optional_components, parts)
    checkpoints: dict[str, Checkpoint] = {}
    modules: dict[str, nn.Module] = {}
    for name, part in parts.items():
        kind = index.component_class(part)
        if is_diffusers(kind) or issubclass(kind, PreTrainedModel):
            if single := _single(kind, part, source.folder, options):
                # As in from_single_file: dtypes change when all is loaded.
                checkpoints[name], modules[name] = single
                continue
            kept, opens = dtype_of(dtype, name), not configs_only
            checkpoint, modules[name] = _from_folder(kind, part.folder, source, kept, options.variant, opens)
            if checkpoint is not None:
                checkpoints[name] = checkpoint
    check_single_files(options, cls.__name__, modules)
    check_components(dtype, modules)
    _check_whole(cls, options, checkpoints, modules)
    check_variant(options.variant, checkpoints)
    return Prepared(source, cls, parts, checkpoints, modules, dtype, options)


def _from_folder(
    kind: Any, folder: Path, source: ModelSource, dtype: torch.dtype | None, variant: str | None, opens: bool
) -> tuple[Checkpoint | None, nn.Module]:
    """Return the weights of a component, if its folder is to be opened for them, and the component on meta."""
    if is_diffusers(kind) and is_several(kind):
        module = build(kind, folder, dtype)
        return SeveralWeights.of(module, folder, source.remote, variant) if opens else None, module
    checkpoint = Checkpoint.open(folder, source.remote, variant) if opens else None
    return checkpoint, build(kind, folder, dtype, checkpoint.stored_dtype if checkpoint else None)


def _single(kind: Any, part: Component, model: Path, options: ModelOptions) -> tuple[Checkpoint, nn.Module] | None:
    """Return the single file of a component, and the component on meta; None if it is loaded from the folder.

    Raises InputError if a file given for the component does not contain it.
    """
    path = options.single_files.get(part.name) or options.single_files.get(WHOLE)
    if path is None:
        return None
    named = part.name in options.single_files
    if is_diffusers(kind) and is_several(kind):
        if named:
            raise InputError(f"single_files: {part.name} is several models, which one file cannot hold; leave it out")
        return None
    if is_diffusers(kind):
        if not named and loadable(kind) is None:
            return None
        module, original = build(kind, part.folder), Original.at(path, kind.load_config(str(part.folder)))
        if named:
            original.converted(module)
        return (original, module) if named or holds(module, original) else None
    text = text_encoder(kind, path, model, part.name)
    if text is None and named:
        raise InputError(f"single_files: {path} does not hold {kind.__name__} in a form that diffusers converts")
    return (text, build(kind, part.folder, None, None)) if text is not None else None


def _check_whole(
    cls: type[Any], options: ModelOptions, checkpoints: Mapping[str, Checkpoint], modules: Mapping[str, nn.Module]
) -> None:
    """Raise InputError if a model in one file lacks the denoiser, or if several models would use the same tensors: the
    folder's weights, or one expert twice, would be used silently."""
    path = options.single_files.get(WHOLE)
    if path is None:
        return
    wanted = {name: m for name, m in modules.items() if denoises(name, m) and name not in options.single_files}
    advice = "give a file for one component by its name (single_files=, --single-file NAME=PATH)"
    for name, module in wanted.items():
        if not isinstance(checkpoints.get(name), Original):
            what = f"{name} ({type(module).__name__}) of {cls.__name__}"
            raise InputError(f"single file {path} does not hold {what}: it is for another model, or {advice}")
    kinds = [type(module) for module in wanted.values()]
    if len(set(kinds)) < len(kinds):
        raise InputError(f"single file {path} is one model, but {cls.__name__} has {' and '.join(wanted)}: {advice}")


def load_pipeline(
    prepared: Prepared,
    owned: Mapping[str, Owned] = MappingProxyType({}),
    *,
    device: torch.device | str = "cpu",
    reads: Reads | None = None,
) -> DiffusionPipeline:
    """Load the pipeline with only the owned weights in memory; `prepared` is consumed.

    owned: for each module a predicate over parameter names (as in named_parameters; also called for persistent
    buffers); a module without an entry is owned whole. With everything owned the result equals
    `DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)`.

    reads: counts the bytes of weights read. Raises InputError and UnsupportedError, one line each.
    """
    cls, options = prepared.cls, prepared.options
    unknown = sorted(set(owned) - set(prepared.modules))
    if unknown:
        raise InputError(f"{cls.__name__} has no module {unknown[0]!r}: it has {', '.join(prepared.modules)}")
    loaded: dict[str, Any] = {
        name: load_component(prepared, name, owned.get(name, _everything), device=device, reads=reads)
        for name in prepared.modules
    }
    pipe = _construct(cls, prepared.source, {**loaded, **_processors(prepared.parts)})
    if wants_scheduler(options):
        pipe.register_modules(scheduler=changed_scheduler(getattr(pipe, "scheduler", None), options, cls))
    return pipe


def load_component(
    prepared: Prepared,
    name: str,
    owned: Owned,
    *,
    device: torch.device | str = "cpu",
    reads: Reads | None = None,
) -> nn.Module:
    """Load the owned weights of one module, mostly into the module on meta, and return it. Arguments and errors are
    those of `load_pipeline`."""
    module, checkpoint, dtype = prepared.modules[name], prepared.checkpoints[name], dtype_of(prepared.dtype, name)
    if isinstance(checkpoint, OriginalText):
        return checkpoint.load(module, owned, dtype=dtype, device=device)
    if isinstance(checkpoint, Original):
        return load_original(module, checkpoint, owned, dtype=dtype, device=device, reads=reads)
    load = load_module if is_diffusers(type(module)) else load_transformers
    return load(module, checkpoint, owned, dtype=dtype, device=device, reads=reads)


def _everything(_: str) -> bool:
    return True


def check_scheduler(cls: type[Any], parts: Mapping[str, Component], options: ModelOptions) -> None:
    """Raise InputError if the options request a scheduler that the model, of pipeline class `cls`, cannot have."""
    if wants_scheduler(options):
        part = parts.get("scheduler")
        if part is None and has_default(inspect.signature(cls.__init__).parameters, "scheduler"):
            return  # created by the class, and there once the model is loaded
        kind: Any = None if part is None else index.component_class(part)
        changed_scheduler(None if part is None else kind.from_pretrained(str(part.folder)), options, cls)


def is_diffusers(cls: type) -> bool:
    """Return whether a class is a diffusers model, which can be loaded in part."""
    from diffusers.models.modeling_utils import ModelMixin

    return issubclass(cls, ModelMixin)


def _processors(parts: dict[str, Component]) -> dict[str, Any]:
    """Build the processors of Qwen-VL without their video half if torchvision, which that needs, is missing."""
    from shardit.models.processor import build_processor, is_needed

    needed = {name: str(part.class_name) for name, part in parts.items() if is_needed(str(part.class_name))}
    return {name: build_processor(parts[name].folder, kind) for name, kind in needed.items()}


def _construct(cls: type[Any], source: ModelSource, passed: dict[str, Any]) -> DiffusionPipeline:
    """Build the pipeline as from_pretrained does, with our modules passed in."""
    try:
        with quiet():
            pipe = cls.from_pretrained(str(source.folder), **passed)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # tokenizers and schedulers check their files by any kind
        reason = damaged_json(source.folder.glob("*/*.json")) or first_line(error)
        raise InputError(f"{cls.__name__} cannot be made from {source.folder}: {reason}") from error
    pipe.register_to_config(_name_or_path=source.name)
    return pipe
