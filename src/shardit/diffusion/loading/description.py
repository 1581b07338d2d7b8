"""Describes the components of a model before any weight is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardit.diffusion.loading.pipeline import Prepared, is_diffusers, prepare
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.index import Component
from shardit.loading.single_file import Original, OriginalText
from shardit.loading.transformers_model import module_keys
from shardit.loading.weights import check_tensors, file_keys, targets
from shardit.settings.model_options import NO_OPTIONS, ModelOptions

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Description:
    """A pipeline without its weights.

    components: those that the pipeline class takes. modules: the models among them, on meta. sizes: the bytes in the
    files per module and parameter name (as in state_dict; tensors that the module does not use are left out).
    """

    folder: Path
    pipeline_class: type
    components: dict[str, Component]
    modules: dict[str, nn.Module]
    sizes: dict[str, dict[str, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(sum(sizes.values()) for sizes in self.sizes.values())


def describe(
    model: str | os.PathLike, pipeline_class: str | type | None = None, options: ModelOptions = NO_OPTIONS
) -> Description:
    """Describe a folder, hub id or "tiny/NAME" from configs and weight headers alone.

    No weights of a hub id are downloaded. Raises the errors of loading for models that cannot be loaded.
    """
    return description_of(prepare(model, pipeline_class, options=options))


def description_of(found: Prepared) -> Description:
    """Describe a pipeline that is not loaded yet."""
    sizes = {name: _sizes(module, found.checkpoints[name]) for name, module in found.modules.items()}
    return Description(found.source.folder, found.cls, found.parts, found.modules, sizes)


def describe_configs(folder: Path) -> Description:
    """Describe a folder with configurations alone; `sizes` are those of weights in bfloat16."""
    found = prepare(folder, dtype="bfloat16", configs_only=True)
    sizes = {
        name: {key: tensor.numel() * tensor.element_size() for key, tensor in module.state_dict().items()}
        for name, module in found.modules.items()
    }
    return Description(found.source.folder, found.cls, found.parts, found.modules, sizes)


def _sizes(module: nn.Module, checkpoint: Checkpoint) -> dict[str, int]:
    if isinstance(checkpoint, OriginalText):
        return {name: tensor.numel() * tensor.element_size() for name, tensor in module.state_dict().items()}
    if isinstance(checkpoint, Original):
        tensors = checkpoint.converted(module).tensors
        targets(module, checkpoint, {name: name for name in tensors})  # raises with the name of a missing one
        return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    if is_diffusers(type(module)):
        check_tensors(module, checkpoint)
        pairs = [(key, name) for name, key in file_keys(module, checkpoint).items()]
    else:
        pairs = list(module_keys(module, checkpoint).items())
    held = module.state_dict()
    sizes: dict[str, int] = {}
    for key, name in pairs:
        if name in held:
            sizes[name] = sizes.get(name, 0) + checkpoint.entry(key).nbytes
    return sizes
