"""Key-value caches of cut encoders: each rank keeps the keys of its own layers, and of others' the sizes.

Code outside the layers asks a cache how long it is. So where another rank's layer has put something into the cache,
this rank puts a stand-in: the same object with tensors without data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class _NoData:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def find_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The caches among the arguments of a layer: objects with a list of layers and a method that updates them."""
    values = [*args, *kwargs.values()]
    return [v for v in values if isinstance(getattr(v, "layers", None), list) and not isinstance(v, nn.Module)]


def empty_layers_kept(cache: Any) -> list[Any]:
    """The layers of a cache, those without data as copies: what the cache is given back after a call that is not to
    count, which fills no more than its own layer."""
    return [layer if _has_data(layer) else copy.deepcopy(layer) for layer in cache.layers]


def state_of(cache: Any) -> list[dict[str, Any]]:
    """What tells later which layers of a cache were changed."""
    return [_marks(layer) for layer in cache.layers]


def taken_since(state: list[dict[str, Any]], cache: Any) -> dict[int, Any]:
    """By number, the layers of a cache that were changed since `state_of`, without the data of their tensors."""
    known = dict(enumerate(state))
    return {i: _hollow(layer) for i, layer in enumerate(cache.layers) if _marks(layer) != known.get(i)}


def replace_layers(cache: Any, layers: dict[int, Any]) -> None:
    """Put stand-ins for layers of another rank into this rank's cache."""
    for number in sorted(layers):
        layer = layers[number]
        for name, value in vars(layer).items():
            if isinstance(value, _NoData):
                empty = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device="meta")
                setattr(layer, name, empty)
        if number < len(cache.layers):
            cache.layers[number] = layer
        else:
            cache.layers.append(layer)


def _has_data(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, torch.Tensor) and keys.numel() > 0


def _marks(layer: Any) -> dict[str, Any]:
    return {name: _mark(value) for name, value in vars(layer).items()}


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (id(value), tuple(value.shape))
    return value if isinstance(value, (bool, int, float, str)) else id(value)


def _hollow(layer: Any) -> Any:
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(other, name, _NoData(tuple(value.shape), tuple(value.stride()), value.dtype))
    return other
