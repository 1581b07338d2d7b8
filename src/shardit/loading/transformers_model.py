"""Loads transformers models: whole by transformers itself, in part as diffusers models are loaded, or not at all."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError, first_line
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.meta import build
from shardit.loading.quiet import quiet
from shardit.loading.safetensors_file import Reads
from shardit.loading.weights import Owned, load_module

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_transformers(
    module: nn.Module,
    checkpoint: Checkpoint,
    owned: Owned,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    reads: Reads | None = None,
) -> nn.Module:
    """Return `module` (built on meta) itself if nothing is owned, else the model as from_pretrained loads it.

    If `owned` gives slices or leaves tensors out, only owned data is read, into `module`. If the tensors of the file do
    not correspond one to one to those of the model, the model is loaded whole and the caller cuts it.
    Raises InputError for errors of from_pretrained.
    """
    cls: Any = type(module)
    ours = [owned(name) for name, _ in module.named_parameters()]
    if not any(ours):
        return module
    whole = all(part is True for part in ours)
    keys = None if whole else _one_to_one(module, checkpoint)
    generation: Any = _generation_config(module, checkpoint)
    if keys is not None:
        if generation is not None:
            module.generation_config = generation
        return load_module(module, checkpoint, owned, device=device, reads=reads, keys=keys)
    checkpoint.ensure(set(checkpoint.names), reads)
    try:
        # The arguments of diffusers' own pipeline loader; dtype None means "auto" there too.
        with quiet():
            loaded, info = cls.from_pretrained(
                str(checkpoint.folder),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                variant=checkpoint.variant,
            )
    except (OSError, ValueError, RuntimeError) as error:
        first = first_line(error)
        reason = _wrong_shape(module, checkpoint) or f"transformers cannot load {checkpoint.folder}: {first}"
        raise InputError(reason) from error
    if missing := sorted(info["missing_keys"]):  # transformers would continue with random numbers
        raise InputError(
            f"{checkpoint.folder} has no tensor {missing[0]} for {cls.__name__}: weights and config.json do not belong "
            "together"
        )
    if reads is not None:
        reads.bytes += checkpoint.nbytes
    return loaded.to(device)


def _one_to_one(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """Return module name -> file key, or None if the files contain tensors in another form than the model."""
    keys = module_keys(module, checkpoint)
    names = {name: key for key, name in keys.items()}
    held = module.state_dict()
    alike = all(tuple(held[name].shape) == checkpoint.entry(key).shape for name, key in names.items() if name in held)
    return names if alike and len(names) == len(keys) and not _converts(module) else None


def _converts(module: Any) -> bool:
    """Return whether transformers would compute tensors from those in the files instead of renaming them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 only renames
        return False
    return any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(module))


def _generation_config(module: Any, checkpoint: Checkpoint) -> Any:
    """Return the generation configuration in the folder of a model; None if it has none. Raises InputError if it is
    damaged, which transformers would pass over, or fail on."""
    from transformers import GenerationConfig

    path = checkpoint.folder / "generation_config.json"
    if not module.can_generate() or not path.is_file():
        return None
    try:
        ends = json.loads(path.read_text("utf-8")).get("eos_token_id")
        found = GenerationConfig.from_pretrained(str(checkpoint.folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: download or copy it again") from error
    if not all(isinstance(one, (int, type(None))) for one in (ends if isinstance(ends, list) else [ends])):
        raise InputError(f"{path}: eos_token_id must be a token id or a list of these, got {ends!r:.80}")
    return found


def _wrong_shape(module: nn.Module, checkpoint: Checkpoint) -> str | None:
    """Return the name of the tensor that does not fit the model, which is not in transformers' own error."""
    held, kind = module.state_dict(), type(module).__name__
    for key, name in module_keys(module, checkpoint).items():
        shape = checkpoint.entry(key).shape
        if name in held and tuple(held[name].shape) != shape:
            return (
                f"{checkpoint.folder / checkpoint.files[key]}: {key} has shape {list(shape)}, but {kind} needs "
                f"{list(held[name].shape)}: weights and config.json do not belong together"
            )
    return None


def module_keys(model: type | nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Map file key -> module name by transformers' own renaming of old checkpoints.

    `model` is a transformers class or a module of it. Several file keys may give one name (merged experts). Unused keys
    keep their renamed form.
    """
    module = build(model, checkpoint.folder) if isinstance(model, type) else model
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return _module_keys_4(module, checkpoint)
    rules = get_model_conversion_mapping(module)  # pyright: ignore[reportArgumentType]
    renamings: Any = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: Any = [rule for rule in rules if isinstance(rule, WeightConverter)]
    held = module.state_dict()
    prefix: Any = getattr(module, "base_model_prefix", None)
    return {key: rename_source_key(key, renamings, converters, prefix, held)[0] for key in checkpoint.files}


def _module_keys_4(module: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Map file key -> module name in transformers 4, which has the renaming as regular expressions on the class."""
    rules: dict[str, str] = getattr(module, "_checkpoint_conversion_mapping", None) or {}
    renamed = {}
    for key in checkpoint.files:
        name = key
        for pattern, replacement in rules.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[key] = name
    return renamed
