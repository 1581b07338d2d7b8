"""Key-value caches of layer-sharded encoders: each rank keeps the keys of its own layers and the sizes of all others.

Code outside the layers reads the length of a cache. So for each cache entry that a layer of another rank adds, this
rank stores a stand-in: the same object with tensors that have no data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only


@dataclass(frozen=True)
class _TensorLayout:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _TensorLayout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


def find_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the caches among the arguments of a layer: objects with a list of layers that are no modules."""
    values = [*args, *kwargs.values()]
    return [v for v in values if isinstance(getattr(v, "layers", None), list) and not isinstance(v, nn.Module)]


def copy_empty_layers(cache: Any) -> list[Any]:
    """Return the layers of a cache, with copies of those without data. They restore the cache after a trial call, which
    fills only its own layer."""
    return [layer if _has_data(layer) else copy.deepcopy(layer) for layer in cache.layers]


def state_of(cache: Any) -> list[dict[str, Any]]:
    """Return a record of a cache with which `changed_layers` finds the layers that changed."""
    return [_marks(layer) for layer in cache.layers]


def changed_layers(state: list[dict[str, Any]], cache: Any) -> dict[int, Any]:
    """Return the layers of a cache that changed since `state_of`, by index, without the data of their tensors."""
    known = dict(enumerate(state))
    return {i: _without_data(layer) for i, layer in enumerate(cache.layers) if _marks(layer) != known.get(i)}


def replace_layers(cache: Any, layers: dict[int, Any]) -> None:
    """Insert stand-ins for layers of another rank into this rank's cache."""
    for number in sorted(layers):
        layer = layers[number]
        for name, value in vars(layer).items():
            setattr(layer, name, tree_map_only(_TensorLayout, _TensorLayout.empty, value))
        if number < len(cache.layers):
            cache.layers[number] = layer
        else:
            cache.layers.append(layer)


def _has_data(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, torch.Tensor) and keys.numel() > 0


def _marks(layer: Any) -> dict[str, Any]:
    # Layers of linear attention have their states in dicts, which they fill in place.
    return {name: tree_map(_mark, value) for name, value in vars(layer).items()}


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (id(value), tuple(value.shape))
    return value if isinstance(value, (bool, int, float, str)) else id(value)


def _without_data(layer: Any) -> Any:
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(other, name, tree_map_only(torch.Tensor, _TensorLayout.of, value))
    return other
