"""Loads transformers models: whole by transformers itself, in part as diffusers models are loaded, or not at all."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardit.core.placement.slices import Slice
from shardit.errors import InputError, first_line
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.dtypes import file_dtype
from shardit.loading.meta import build
from shardit.loading.quiet import quiet
from shardit.loading.safetensors_file import Reads, read_slice
from shardit.loading.weights import Owned, Target, load_module, place

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

    If `owned` gives slices or leaves tensors out, only owned data is read, into `module`; what transformers computes
    from several tensors of the files (merged experts) is computed for owned tensors alone, one after the other. If
    tensors do not correspond otherwise, the model is loaded whole and the caller cuts it.
    Raises InputError for errors of from_pretrained.
    """
    cls: Any = type(module)
    ours = [owned(name) for name, _ in module.named_parameters()]
    if not any(ours):
        return module
    whole = all(part is True for part in ours)
    forms = None if whole else _forms(module, checkpoint)
    generation: Any = _generation_config(module, checkpoint)
    if forms is not None:
        if generation is not None:
            module.generation_config = generation
        return _load_in_part(module, checkpoint, owned, *forms, device, reads)
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


@dataclass(frozen=True)
class _Computed:
    """Tensors of a model that transformers computes from tensors of the files, such as merged experts.

    sources: keys in the files, in the order of transformers, each with the pattern of the rule that it matches.
    """

    rule: Any
    targets: tuple[str, ...]
    sources: list[tuple[str, str]]


def _forms(module: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], list[_Computed]] | None:
    """Return the file keys of tensors that the files have as the model has them, by their names in it, and the tensors
    that are computed; None if some tensor is neither."""
    rules, renamed = _renamed(module, checkpoint)
    held = module.state_dict()
    names = {name: key for key, (name, pattern) in renamed.items() if pattern is None}
    alike = all(tuple(held[name].shape) == checkpoint.entry(key).shape for name, key in names.items() if name in held)
    computed: dict[str, _Computed] = {}
    for key, (name, pattern) in renamed.items():
        if pattern is not None:
            first, *more = rules[pattern].target_patterns
            targets = (name, *(name.replace(first, one) for one in more))
            computed.setdefault(name, _Computed(rules[pattern], targets, [])).sources.append((key, pattern))
    made = [name for one in computed.values() for name in one.targets]
    plain = [name for name, pattern in renamed.values() if pattern is None]
    known = all(name in held for name in made) and len({*made, *plain}) == len(made) + len(plain)
    return (names, list(computed.values())) if alike and known else None


def _load_in_part(
    module: nn.Module,
    checkpoint: Checkpoint,
    owned: Owned,
    names: dict[str, str],
    computed: list[_Computed],
    device: torch.device | str,
    reads: Reads | None,
) -> nn.Module:
    """Fill the owned part of a module, as `load_module` does."""
    held: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    later = {name: one.sources[0][0] for one in computed for name in one.targets}

    def read(name: str) -> bool | Slice:
        return name not in later and owned(name)

    load_module(module, checkpoint, read, device=device, reads=reads, keys={**names, **later})
    for one in computed:
        parts = {name: owned(name) for name in one.targets}
        if any(parts.values()):
            made = _computed(module, checkpoint, one, held, reads)
            for name, part in parts.items():
                if part:
                    tensor = part.take(made.pop(name)) if isinstance(part, Slice) else made.pop(name)
                    place(module, Target((name,), None, held[name]), tensor.to(device))
    return module


def _computed(
    module: Any, checkpoint: Checkpoint, one: _Computed, held: dict[str, torch.Tensor], reads: Reads | None
) -> dict[str, torch.Tensor]:
    """Return the whole tensors that a rule of transformers makes of those in the files. Raises InputError."""
    checkpoint.ensure({checkpoint.files[key] for key, _ in one.sources}, reads)
    rule, first = copy.deepcopy(one.rule), one.targets[0]
    for key, pattern in one.sources:
        rule.add_tensor(first, key, pattern, functools.partial(_read, checkpoint, key, held[first].dtype, reads))
    try:
        found = rule.convert(first, model=module, config=module.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
        right = all(made[name].shape == held[name].shape for name in one.targets)
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError):
        made, right = {}, False
    if not right:
        raise InputError(
            f"{checkpoint.folder}: the tensors of {first} ({one.sources[0][0]} and others) do not give what "
            f"{type(module).__name__} needs: weights and config.json do not belong together"
        )
    return made


def _read(checkpoint: Checkpoint, key: str, dtype: torch.dtype, reads: Reads | None) -> torch.Tensor:
    """Return a tensor of the files. Raises InputError for a format that torch cannot read."""
    import torch

    entry, path = checkpoint.entry(key), checkpoint.folder / checkpoint.files[key]
    if (stored := file_dtype(entry.dtype)) is None:
        raise InputError(f"{path}: {key} has format {entry.dtype}, which torch cannot read: use other weights")
    tensor = torch.empty(entry.shape, dtype=stored)
    read_slice(path, entry, None, tensor, reads)
    return tensor.to(dtype)


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
    except Exception as error:  # no dict, or refused by transformers' own validation
        raise InputError(f"{path} is damaged ({first_line(error)}): download or copy it again") from error
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
    renamed = _renamed(module, checkpoint)[1]
    return {key: renamed[key][0] for key in checkpoint.files}


def _renamed(module: Any, checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, tuple[str, str | None]]]:
    """Return the rules of transformers that compute tensors, by the pattern of their sources, and by file key, in the
    order of transformers, the name in the module and the pattern that it matches, if any."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4 only renames
        return {}, {key: (name, None) for key, name in _module_keys_4(module, checkpoint).items()}
    rules = get_model_conversion_mapping(module)
    renamings: Any = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters: Any = [rule for rule in rules if isinstance(rule, WeightConverter)]
    held = module.state_dict()
    prefix: Any = getattr(module, "base_model_prefix", None)
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    ordered = sorted(checkpoint.files, key=dot_natural_key)
    return of_pattern, {key: rename_source_key(key, renamings, converters, prefix, held) for key in ordered}


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
