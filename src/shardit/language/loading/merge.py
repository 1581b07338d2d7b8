"""Adds LoRA adapters to the weights of a language model while it is loaded; each rank merges those that it owns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardit.core.modules.patching import set_tensor
from shardit.core.placement.slices import Owned, Slice
from shardit.errors import InputError
from shardit.language.loading.adapter import Adapter
from shardit.loading.safetensors_file import read_tensor

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of whole parameters by name."""


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, under all their names."""
    return {name: tuple(one.shape) for name, one in module.named_parameters(remove_duplicate=False)}


def check_adapters(module: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Raise InputError for an adapter that does not fit a model, which may be on meta."""
    shapes, parts, owner = shapes_of(module), dict(module.named_modules()), dict[str, str]()
    for adapter in adapters:
        for name in adapter.pairs:
            _check_pair(module, parts.get(name), adapter, name)
        for name, key in adapter.replaced.items():
            if shapes.get(name) != adapter.header.entries[key].shape:
                has = f"{key} of shape {list(adapter.header.entries[key].shape)}"
                needs = f"{name} has {list(shapes[name])}" if name in shapes else "it has no such parameter"
                raise InputError(f"{_unfit(module, adapter)}: the file has {has}, {needs}{adapter.base}")
            if ".base_layer." not in key and owner.setdefault(name, adapter.path) != adapter.path:
                raise InputError(f"lora {owner[name]} and {adapter.path} both replace {name}: leave one out")


def _check_pair(module: nn.Module, part: Any, adapter: Adapter, name: str) -> None:
    """Raise InputError if the matrices of a module have no place in the model."""
    if not _is_able(part):
        what = "no such module" if part is None else f"a {type(part).__name__} there, no linear and no embedding"
        raise InputError(f"{_unfit(module, adapter)}: the file has weights for {name}, it has {what}{adapter.base}")
    weight, rank = tuple(part.weight.shape), adapter.rank(name)
    rows, columns = weight[::-1] if _is_transposed(part) else weight
    first, second = (adapter.header.entries[key].shape for key in adapter.pairs[name])
    if (first, second) != ((rank, columns), (rows, rank)):
        raise InputError(
            f"{_unfit(module, adapter)}: {name} needs matrices of {[rank, columns]} and {[rows, rank]}, the file has "
            f"{list(first)} and {list(second)}{adapter.base}"
        )


def _unfit(module: nn.Module, adapter: Adapter) -> str:
    return f"lora {adapter.path} does not fit {type(module).__name__}"


def _is_able(part: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(part, (nn.Linear, nn.Embedding, Conv1D))


def _is_transposed(part: Any) -> bool:
    """Return whether the weight of a module is the transpose of the product B A."""
    return not isinstance(part, nn.Linear)


def merge_adapters(model: nn.Module, adapters: Sequence[Adapter], owned: Owned, shapes: Shapes) -> None:
    """Merge adapters into a loaded model, in place, as `merge_and_unload` of peft does; the arithmetic is the same.

    owned: what the rank keeps of each weight. Slices are taken of the merged weight, or are merged with the slice of
    the change. Tied weights become separate ones, if an adapter changes one of them: training has changed only that.
    shapes: of whole parameters.
    """
    with torch.no_grad():
        for adapter in adapters:
            for name, key in adapter.replaced.items():
                _replace(model, adapter, name, key, owned)
        for adapter in adapters:
            for module in adapter.pairs:
                _add(model, adapter, module, owned, shapes)


def _replace(model: Any, adapter: Adapter, name: str, key: str, owned: Owned) -> None:
    _untie(model, name)
    held, part = model.get_parameter(name), owned(name)
    if held.is_meta or not part:
        return
    value = read_tensor(adapter.file, adapter.header.entries[key])
    if isinstance(part, Slice) and held.shape != value.shape:
        value = part.take(value)
    set_tensor(model, name, nn.Parameter(value.to(held), held.requires_grad))


def _add(model: Any, adapter: Adapter, module: str, owned: Owned, shapes: Shapes) -> None:
    name = f"{module}.weight"
    _untie(model, name)
    held, part = model.get_parameter(name), owned(name)
    if held.is_meta or not part:
        return
    first, second = (read_tensor(adapter.file, adapter.header.entries[key]) for key in adapter.pairs[module])
    # peft has the matrices in float32 even if the file has halves.
    first, second = (one.to(held.device, torch.promote_types(one.dtype, torch.float32)) for one in (first, second))
    change = second @ first
    change = change.T if _is_transposed(model.get_submodule(module)) else change
    if isinstance(part, Slice) and tuple(held.shape) != shapes[name]:
        change = part.take(change)
    held.data += change.mul_(adapter.factor(module))  # in place: alignment decides the last bits of later products


def _untie(model: Any, name: str) -> None:
    """Give a parameter that is tied to others memory of its own."""
    held = model.get_parameter(name)
    if Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))[id(held)] > 1:
        set_tensor(model, name, nn.Parameter(held.detach().clone(), held.requires_grad))
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.config.tie_word_embeddings = False
