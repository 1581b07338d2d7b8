"""The signature of a loaded pipeline, with its sizes and the model facts for the records of its outputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.diffusers_source import module_of, refused_above, refused_without
from shardit.diffusion.loading.required_packages import missing
from shardit.diffusion.preflight.static_sizes import layers_in, static_sizes
from shardit.diffusion.request.pipeline_signature import PipelineSignature, has_adapter, signature_of
from shardit.diffusion.request.size_multiples import least_sides, size_multiples
from shardit.diffusion.request.step_lists import refused_lists
from shardit.engine.nodes.node_info import versions
from shardit.engine.nodes.revision import model_revision, revision_of
from shardit.loading.hub import cached
from shardit.settings.model_options import ModelOptions, recorded

if TYPE_CHECKING:
    from shardit.engine.process.messages import SessionSpec


def loaded_signature(pipe: Any, spec: SessionSpec, index: dict[str, Any], rate: int | None = None) -> PipelineSignature:
    """Return the signature of a pipeline with this index; rate: samples per second of its sound."""
    found = signature_of(type(pipe), index, sample_rate=rate)
    parts = ((name, getattr(part, "config", None)) for name, part in pipe.components.items())
    configs = {name: config for name, config in parts if isinstance(config, Mapping)}
    adapted = any(map(has_adapter, configs.values()))
    lacks = hasattr(pipe, "load_ip_adapter") and not adapted
    own = type(pipe).__module__.partition(".")[0] == "diffusers"
    # A call that is tried may fail before its checks, for want of another argument, such as a video.
    in_source = static_sizes(found.class_name, found.names, configs)["multiples"] if own else {}
    sizes: dict[str, Any] = {"multiples": {**in_source, **size_multiples(pipe)}, "least": least_sides(pipe)}
    return dataclasses.replace(
        found.without(refused_without(found.class_name, index) if own else ()),
        **sizes,
        most=refused_above(found.class_name, layers_in(_texts(pipe))) if own else {},
        refused=refused_lists(found.names, pipe.components.get("scheduler"), module_of(found.class_name))
        if own
        else {},
        made_by=_made_by(spec),
        missing=missing(type(pipe)),
        lacks_adapter=lacks,
        adapted=adapted,
    )


def _texts(pipe: Any) -> dict[str, Mapping[str, Any]]:
    """Return the configurations of the components that are of transformers, by name."""
    configs = {name: getattr(part, "config", None) for name, part in pipe.components.items()}
    return {name: vars(config) for name, config in configs.items() if hasattr(config, "model_type")}


def _made_by(spec: SessionSpec) -> dict[str, Any]:
    """Return the facts of the model for saved files, under the names of `Omni`."""
    values = {
        "model": spec.model,
        "revision": _revision(spec.model),
        "file_revisions": _file_revisions(spec.options),
        "dtype": spec.dtype,
        "attention_backend": spec.attention_backend,
        "versions": versions(),
        "ranks": _not_default(spec.config),
        **recorded(spec.options),
    }
    return {name: value for name, value in values.items() if value is not None}


def _revision(model: str) -> str | None:
    """Return the commit of a hub id, or a digest of a folder; None for a model that comes with shardit."""
    hub = None if model.startswith("tiny/") or os.path.exists(model) else cached(model)
    return hub.parent.name if hub is not None else model_revision(model)


def _file_revisions(options: ModelOptions) -> dict[str, str] | None:
    """Return digests of the files of adapters and components that are on this machine, by their paths."""
    paths = [*(lora.path for lora in options.lora), *options.single_files.values()]
    found = {path: revision_of(path) for path in paths}
    return {path: revision for path, revision in found.items() if revision is not None} or None


def _not_default(config: DiffusionParallelConfig) -> dict[str, Any] | None:
    """Return the parallel settings that were chosen: some arrangements round differently."""
    plain = DiffusionParallelConfig()
    chosen = {name: value for name, value in vars(config).items() if value != getattr(plain, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()} or None
