"""The signature of a diffusers pipeline, read from its source: importing diffusers and torch takes seconds."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from shardit.diffusion.loading.diffusers_source import (
    definition,
    has_method,
    lineage,
    method,
    parameters,
    refused_above,
    refused_without,
)
from shardit.diffusion.loading.variants import image_pipeline_name
from shardit.diffusion.preflight.static_sizes import configs_in, layers_in, static_sizes, with_defaults
from shardit.diffusion.request.pipeline_signature import PipelineSignature, has_adapter, signature_from


def static_signature(class_name: str, model_index: Mapping[str, Any] | None = None) -> PipelineSignature | None:
    """Return the signature of the installed diffusers' class of that name, as `signature_of` does, or None if it is not
    found."""
    definitions = list(_calls(class_name))
    if not definitions:
        return None
    found = signature_from(class_name, [list(parameters(call.args)) for call in definitions], model_index)
    outputs = next((fields for call in definitions if (fields := _output_fields(call))), ())
    lacking = () if model_index is None else refused_without(class_name, model_index)
    return dataclasses.replace(found.without(lacking), outputs=outputs)


def static_signatures_of_model(
    model: str | os.PathLike[str],
) -> tuple[PipelineSignature | None, PipelineSignature | None]:
    """Return the signatures of the pipeline of a model on this disk, and of its second pipeline for requests with an
    image; None for a missing pipeline, or one that must be imported to be known.

    Raises InputError if there is no such model.
    """
    from shardit.loading.index import components, read_index
    from shardit.loading.source import local_folder

    folder, text = local_folder(model), os.fspath(model)
    name, config, configs = None, {}, {}
    if folder is not None:
        config = read_index(folder)
        name, configs = config["_class_name"], configs_in(components(folder))
    elif text.startswith("tiny/"):
        from shardit.models.tiny.recipes.catalog import recipe

        found = recipe(text.removeprefix("tiny/"))
        name, config = found.pipeline, found.config
        configs = {key: with_defaults(part.cls, part.config) for key, part in found.parts.items() if part is not None}
    if not isinstance(name, str):
        return None, None
    with_image = image_pipeline_name(name, config)
    return _sized(static_signature(name, config), configs), _sized(
        static_signature(with_image, config) if with_image else None, configs
    )


def _sized(found: PipelineSignature | None, configs: Mapping[str, Mapping[str, Any]]) -> PipelineSignature | None:
    sizes: dict[str, Any] = static_sizes(found.class_name, found.names, configs) if found else {}
    if found is None:
        return None
    adapted = any(map(has_adapter, configs.values()))
    return dataclasses.replace(
        found,
        **sizes,
        most=refused_above(found.class_name, layers_in(configs)),
        lacks_adapter=has_method(found.class_name, "load_ip_adapter") and not adapted,
        adapted=adapted,
    )


def _output_fields(call: ast.FunctionDef) -> tuple[str, ...]:
    """Return the fields of the output classes in a `__call__`, as `declared_fields` finds them."""
    names = dict.fromkeys(x.id for x in ast.walk(call) if isinstance(x, ast.Name) and x.id.endswith("Output"))
    found: dict[str, None] = {}
    for node in filter(None, map(definition, names)):
        if any(isinstance(base, ast.Name) and base.id == "BaseOutput" for base in node.bases):
            fields = (x.target for x in node.body if isinstance(x, ast.AnnAssign))
            found.update(dict.fromkeys(target.id for target in fields if isinstance(target, ast.Name)))
    return tuple(found)


def _calls(class_name: str) -> Iterator[ast.FunctionDef]:
    """Yield the `__call__` of a class and those that it overrides, in the order of the first bases."""
    return (call for node in lineage(class_name) if (call := method(node, "__call__")) is not None)
