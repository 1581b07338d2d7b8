"""Model folders and hub ids; building on meta; reading only owned tensors.

Names are imported when they are first used: importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardit.loading.checkpoint import Checkpoint
    from shardit.loading.description import Description, describe, describe_configs
    from shardit.loading.index import Component, components, pipeline_class
    from shardit.loading.meta import build
    from shardit.loading.pipeline import load_pipeline
    from shardit.loading.safetensors_file import Header, Reads, read_into, read_tensor
    from shardit.loading.source import fetch_weights, resolve
    from shardit.loading.transformers_model import load_transformers, module_keys
    from shardit.loading.weights import load_module

_HOME = {
    "Checkpoint": "checkpoint",
    "Component": "index",
    "Description": "description",
    "Header": "safetensors_file",
    "Reads": "safetensors_file",
    "build": "meta",
    "components": "index",
    "describe": "description",
    "describe_configs": "description",
    "fetch_weights": "source",
    "load_module": "weights",
    "load_pipeline": "pipeline",
    "load_transformers": "transformers_model",
    "module_keys": "transformers_model",
    "pipeline_class": "index",
    "read_into": "safetensors_file",
    "read_tensor": "safetensors_file",
    "resolve": "source",
}

__all__ = [
    "Checkpoint",
    "Component",
    "Description",
    "Header",
    "Reads",
    "build",
    "components",
    "describe",
    "describe_configs",
    "fetch_weights",
    "load_module",
    "load_pipeline",
    "load_transformers",
    "module_keys",
    "pipeline_class",
    "read_into",
    "read_tensor",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
