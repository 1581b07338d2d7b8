"""Caches of keys, values and states over stages: each rank has those of its own layers.

A layer of another rank is asked questions outside the blocks: how long it is, how large masks must be. One of this
rank's own layers of the same kind answers for it, as all layers of a kind advance together. Where this rank has none of
a kind, the layer's own code keeps the books, on tensors of one head of width 1.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from shardit.errors import UnsupportedError

CHANGES = (
    *("reorder_cache", "crop", "reset", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch"),
    *("lazy_initialization", "lazy_initialization_indexer", "activate_past_recording", "__init__"),
)
"""Methods that change a cache layer, and so do nothing to one that another rank has."""

UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""Methods that a block calls with what it has computed."""

OWN = "_shardit_layer"


class StageCaches:
    """The books of caches that the blocks of a decoder are given. layers[i]: the number of block i among the layers of
    a cache, None for a block without one."""

    def __init__(self, blocks: Sequence[nn.Module], owners: Sequence[int], rank: int):
        self.layers = [layer_number(block) for block in blocks]
        self._own = sorted({n for n, owner in zip(self.layers, owners, strict=True) if n is not None and owner == rank})
        numbers = [n for n in self.layers if n is not None]
        self._count = max(numbers, default=-1) + 1

    def enter(self, index: int, arguments: Sequence[Any], own: bool) -> None:
        """Before a block call: let a cache that comes for the first time answer for layers of other ranks; advance
        the books of a layer that nothing answers for."""
        for leaf in arguments:
            if isinstance(leaf, Cache):
                left = getattr(leaf, OWN, None)
                if left is None:
                    left = self._join(leaf)
                if not own and self.layers[index] in left:
                    hidden = next(one for one in arguments if isinstance(one, torch.Tensor))
                    _advance(leaf, self.layers[index], hidden.shape[0], hidden.shape[1])

    def _join(self, cache: Any) -> set[int]:
        """Put stand-ins for layers of other ranks into a cache; the numbers of the layers that have none."""
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) < self._count:
                cache.layers.append(cache.layer_class_to_replicate())
        left: set[int] = set()
        kinds = {_kind(cache.layers[n]): cache.layers[n] for n in reversed(self._own) if n < len(cache.layers)}
        for number in range(min(self._count, len(cache.layers))):
            if number not in self._own:
                answering = kinds.get(_kind(cache.layers[number]))
                if answering is None:
                    left.add(number)
                else:
                    cache.layers[number] = elsewhere(answering)
        setattr(cache, OWN, left)
        return left


def layer_number(block: nn.Module) -> int | None:
    """The number that a block has for caches."""
    for module in block.modules():
        if isinstance(number := getattr(module, "layer_idx", None), int):
            return number
    return None


def _kind(layer: Any) -> tuple[Any, ...]:
    """What cache layers have in common that advance together."""
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, (bool, int, str))}
    return (type(layer), *sorted(plain.items()))


def _advance(cache: Any, number: int | None, batch: int, length: int) -> None:
    assert number is not None
    layer = cache.layers[number]
    if isinstance(layer, CacheLayerMixin):
        nothing = torch.zeros(batch, 1, length, 1)
        layer.update(nothing, nothing)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for state in list(layer.has_previous_state):
            layer.has_previous_state[state] = True


def elsewhere(own: Any) -> Any:
    """A cache layer of another rank, for which one of this rank's own answers."""
    return _class_of(type(own))(own)


@functools.cache
def _class_of(cls: type) -> type:
    def __init__(self: Any, own: Any) -> None:
        object.__setattr__(self, OWN, own)

    def __getattr__(self: Any, name: str) -> Any:
        value = getattr(object.__getattribute__(self, OWN), name)
        if isinstance(value, torch.Tensor):
            raise UnsupportedError(f"code outside of the layers reads {name} of a cache layer that another rank has")
        return value

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        return type(self)(copy.deepcopy(getattr(self, OWN), memo))

    members: dict[str, Any] = {"_layer_type": None, "__init__": __init__, "__getattr__": __getattr__}
    members["__deepcopy__"] = __deepcopy__
    for name in dir(cls):
        member = getattr(cls, name)
        if name in UPDATES:
            members[name] = _refused(name)
        elif name in CHANGES and name != "__init__":
            members[name] = lambda self, *args, **kwargs: None
        elif isinstance(member, property):
            members[name] = property(functools.partial(_property, name))
        elif callable(member) and not name.startswith("__"):
            members[name] = functools.partialmethod(_question, name)
    return type(cls.__name__, (cls,), members)


def _question(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(getattr(self, OWN), name)(*args, **kwargs)


def _property(name: str, self: Any) -> Any:
    return getattr(getattr(self, OWN), name)


def _refused(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"a layer calls {name} of a cache layer that another rank has")

    return method
