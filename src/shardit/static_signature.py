"""The signature of a diffusers pipeline, read from its source: importing diffusers and torch takes seconds."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardit.models.variants import image_pipeline_name
from shardit.signature import PipelineSignature, signature_from

_NOT_PLAIN = object()
"""Stands for a default that is no literal."""


def static_signature(class_name: str, model_index: Mapping[str, Any] | None = None) -> PipelineSignature | None:
    """What `signature_of` would say of the installed diffusers' class of that name, or None if it is not found."""
    definitions = list(_calls(class_name))
    if not definitions:
        return None
    found = signature_from(class_name, [list(_parameters(call.args)) for call in definitions], model_index)
    outputs = next((fields for call in definitions if (fields := _output_fields(call))), ())
    return dataclasses.replace(found, outputs=outputs)


def static_signatures_of_model(
    model: str | os.PathLike[str],
) -> tuple[PipelineSignature | None, PipelineSignature | None]:
    """The signatures of the pipeline of a model that is on this disk, and of its second pipeline for requests with an
    image; None for what the model does not have, or what cannot be known without importing.

    Raises InputError where there is no such model.
    """
    from shardit.loading.index import read_index
    from shardit.loading.source import local_folder

    folder, text = local_folder(model), os.fspath(model)
    name, config = None, {}
    if folder is not None:
        config = read_index(folder)
        name = config["_class_name"]
    elif text.startswith("tiny/"):
        from shardit.models.tiny.catalog import recipe

        found = recipe(text.removeprefix("tiny/"))
        name, config = found.pipeline, found.config
    if not isinstance(name, str):
        return None, None
    with_image = image_pipeline_name(name, config)
    return static_signature(name, config), static_signature(with_image, config) if with_image else None


def _output_fields(call: ast.FunctionDef) -> tuple[str, ...]:
    """The fields of the output classes that a `__call__` names, as `declared_fields` finds them."""
    names = dict.fromkeys(x.id for x in ast.walk(call) if isinstance(x, ast.Name) and x.id.endswith("Output"))
    found: dict[str, None] = {}
    for node in filter(None, map(_class, names)):
        if any(isinstance(base, ast.Name) and base.id == "BaseOutput" for base in node.bases):
            fields = (x.target for x in node.body if isinstance(x, ast.AnnAssign))
            found.update(dict.fromkeys(target.id for target in fields if isinstance(target, ast.Name)))
    return tuple(found)


def _calls(class_name: str) -> Iterator[ast.FunctionDef]:
    """The `__call__` of a class and those that it overrides, in the order of the first bases."""
    node = _class(class_name)
    while node is not None:
        call = next((x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__call__"), None)
        if call is not None:
            yield call
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        node = next((found for found in map(_class, bases) if found is not None), None)


def _class(name: str) -> ast.ClassDef | None:
    """The definition of a pipeline class in the installed diffusers."""
    package = importlib.util.find_spec("diffusers")
    if package is None or not package.submodule_search_locations:
        return None
    for file in sorted((Path(package.submodule_search_locations[0]) / "pipelines").rglob("*.py")):
        source = file.read_bytes()
        if f"class {name}".encode() in source:
            found = next((x for x in ast.parse(source).body if isinstance(x, ast.ClassDef) and x.name == name), None)
            if found is not None:
                return found
    return None


def _parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
    kind = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for item, default in zip(positional, defaults, strict=True):
        yield _parameter(item, kind.POSITIONAL_OR_KEYWORD, default)
    if arguments.vararg is not None:
        yield kind(arguments.vararg.arg, kind.VAR_POSITIONAL)
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(item, kind.KEYWORD_ONLY, default)
    if arguments.kwarg is not None:
        yield kind(arguments.kwarg.arg, kind.VAR_KEYWORD)


def _parameter(item: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    annotation = inspect.Parameter.empty if item.annotation is None else ast.unparse(item.annotation)
    return inspect.Parameter(item.arg, kind, default=_value(default), annotation=annotation)


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(default)
    except ValueError:
        return _NOT_PLAIN
