"""Checks a model and its options by names alone, before torch is imported and ranks are started.

All errors are found again when the model is read, where checks of more than names are possible.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardit.config import DiffusionParallelConfig, check_partition_variables
from shardit.diffusion.loading import diffusers_source
from shardit.diffusion.loading.attention_backends import check_attention_backend
from shardit.diffusion.loading.required_packages import check_frameworks, check_packages, missing_by_name
from shardit.diffusion.loading.schedulers import has_default, no_scheduler, wants_scheduler
from shardit.diffusion.loading.start_options import check_lora_file, check_lora_support
from shardit.diffusion.preflight.static_degrees import check_degrees
from shardit.diffusion.preflight.static_scheduler import check_scheduler_names, check_scheduler_packages
from shardit.errors import InputError
from shardit.loading.checkpoint import Checkpoint, check_variant
from shardit.loading.dtypes import Setting, check_components
from shardit.loading.hub import check_cached, index_folder
from shardit.loading.index import Component, check_complete, components, damaged_json, is_left_to_class, read_index
from shardit.loading.safetensors_file import Header
from shardit.loading.source import local_folder
from shardit.models.tiny.cache import check_cache, written_folder
from shardit.models.tiny.recipes.catalog import recipe
from shardit.settings.model_options import WHOLE, ModelOptions, check_single_files

_NO_MODEL = re.compile("Tokenizer|Processor|Extractor|Scheduler")


@dataclass(frozen=True)
class Known:
    """Facts from the names of a model on this disk.

    folder: of a local model with all its files; None for a tiny model, and for one of the hub.
    """

    class_name: str | None
    parts: dict[str, Component]
    models: tuple[str, ...]
    """The components with weights."""
    folder: Path | None = None
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)


def check(
    model: str | os.PathLike[str],
    config: DiffusionParallelConfig,
    options: ModelOptions,
    *,
    dtype: Setting = None,
    attention_backend: str | None = None,
    files: bool = True,
    packages: bool = True,
) -> None:
    """Raise InputError for errors that ranks would find, as far as names show them.

    files, packages: whether the model will be loaded with those of this machine.
    """
    if packages:
        check_frameworks()
        check_attention_backend(attention_backend)
    check_partition_variables(config, os.environ)
    known = _known(model, files)
    name = known and known.class_name
    takes = diffusers_source.init_parameters(name) if name else {}
    if files and known is not None and known.folder is not None and takes:
        checkpoints = _check_files(known, known.folder, takes, options)
        check_degrees(config, {name: (known.parts[name], one) for name, one in checkpoints.items()})
    if files and os.fspath(model).startswith("tiny/"):
        check_cache(os.fspath(model).removeprefix("tiny/"))
    if known is not None and name:
        check_single_files(options, name, known.models)
        check_components(dtype, known.models)
    if packages and known is not None and wants_scheduler(options):
        _check_scheduler(known, options, takes)
    if options.lora and packages:
        check_lora_support(str(name), not name or diffusers_source.has_method(name, "load_lora_weights"))
    for path in options.single_files.values() if files else ():
        Header.read(path)
    for lora in options.lora if files else ():
        if Path(lora.path).exists():
            check_lora_file(lora)
        elif "cache_dir" not in lora.arguments:
            check_cached(lora.path, f"lora {lora.path}")
    if packages and name:
        check_packages(name, missing_by_name(name))


def _known(model: str | os.PathLike[str], files: bool) -> Known | None:
    """Return the facts of a model; None if only the hub, or another machine, knows which version will be loaded."""
    text = os.fspath(model)
    tiny = text.removeprefix("tiny/") if text.startswith("tiny/") else None
    folder = local_folder(model) if tiny is None else written_folder(tiny)
    if tiny is not None and folder is None:
        return _of_tiny(tiny)
    found = folder or (index_folder(text) if files else None)
    if found is None:
        return None
    name = read_index(found)["_class_name"]
    takes = diffusers_source.init_parameters(name) if isinstance(name, str) else {}
    parts = {key: part for key, part in components(found).items() if not part.absent and (not takes or key in takes)}
    optional = diffusers_source.optional_components(name) or () if isinstance(name, str) else ()
    parts = {key: part for key, part in parts.items() if not is_left_to_class(part, found, takes, optional)}
    models = tuple(key for key, part in parts.items() if _is_model(part, found))
    return Known(name if isinstance(name, str) else None, parts, models, folder, _scheduler_config(parts))


def _of_tiny(name: str) -> Known:
    found = recipe(name)
    held = {key: part for key, part in found.parts.items() if part is not None}
    parts = {key: Component(key, part.library, part.cls, Path()) for key, part in held.items()}
    models = tuple(key for key, part in held.items() if part.kind in ("model", "text"))
    scheduler = held.get("scheduler")
    return Known(found.pipeline, parts, models, None, scheduler.config if scheduler else {})


def _is_model(part: Component, folder: Path) -> bool:
    """Return whether a component has weights: by its class's name, and for a local one by its configuration."""
    if _NO_MODEL.search(part.class_name or ""):
        return False
    return part.folder == folder or (part.folder / "config.json").is_file()


def _scheduler_config(parts: Mapping[str, Component]) -> Mapping[str, Any]:
    try:
        found = json.loads((parts["scheduler"].folder / "scheduler_config.json").read_text())
    except (KeyError, OSError, ValueError):
        return {}  # reported when the model is read
    return found if isinstance(found, dict) else {}


def _check_files(known: Known, folder: Path, takes: Mapping[str, Any], options: ModelOptions) -> dict[str, Checkpoint]:
    """Return the weight files of the components from the folder. Raises InputError if one, or a component's folder, is
    missing."""
    name = str(known.class_name)
    optional = diffusers_source.optional_components(name)
    if optional is not None:
        check_complete(folder, name, takes, optional, known.parts)
    if WHOLE in options.single_files:
        return {}  # the file decides which components come from the folder
    read = [part.folder for key, part in known.parts.items() if key not in options.single_files]
    if damage := damaged_json(path for one in read for file in _CONFIGS if (path := one / file).is_file()):
        raise InputError(damage)
    checkpoints: dict[str, Checkpoint] = {}
    for component in known.models:
        part = known.parts[component]
        if component not in options.single_files and part.folder != folder:
            checkpoints[component] = checkpoint = Checkpoint.open(part.folder, variant=options.variant)
            for file in checkpoint.names:
                checkpoint.header(file)
    if checkpoints:
        check_variant(options.variant, checkpoints)
    return checkpoints


_CONFIGS = ("config.json", "scheduler_config.json")


def _check_scheduler(known: Known, options: ModelOptions, takes: Mapping[str, Any]) -> None:
    part = known.parts.get("scheduler")
    if part is None and has_default(takes, "scheduler"):
        return
    if part is None:
        raise no_scheduler()
    check_scheduler_names(options, str(part.class_name), known.scheduler_config, known.class_name)
    check_scheduler_packages(options, str(part.class_name))
