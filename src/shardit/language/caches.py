"""Caches of keys, values and states over stages: each rank has those of its own layers.

A layer of another rank is asked questions outside the blocks: how long it is, how large masks must be. One of this
rank's own layers of the same kind answers for it, as all layers of a kind advance together. Where this rank has none of
a kind, the layer's own code keeps the books, on tensors of one head of width 1.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, LinearAttentionCacheLayerMixin

from shardit.core.decoder.shapes import PLAIN
from shardit.core.modules.state.module_state import State, differences, state_in
from shardit.errors import UnsupportedError

CHANGES = (
    *("reorder_cache", "crop", "reset", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch"),
    *("lazy_initialization", "lazy_initialization_indexer", "activate_past_recording", "__init__"),
)
"""Methods that change a cache layer, and so do nothing to one that another rank has."""

UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""Methods that a block calls with what it has computed."""

OWN = "_shardit_layer"


@dataclass(eq=False)
class NewCache:
    """A cache in the first call of a model. shape: that of the hidden states. passed: the blocks of other ranks that
    have been called with it."""

    cache: Any
    shape: torch.Size
    passed: set[int] = field(default_factory=set)


class StageCaches:
    """The books of caches that the blocks of a decoder are given.

    slots[i]: the layers of a cache that block i updates, found when it first runs.
    """

    def __init__(self, owners: Sequence[int], rank: int):
        self.slots: dict[int, tuple[int, ...]] = {}
        self._owners, self._rank = owners, rank
        self._new: list[NewCache] = []

    def enter(self, index: int, arguments: Sequence[Any], own: bool) -> None:
        """Before a block call: advance the books of layers that the block of another rank updates, and that nothing
        here answers for. A cache that comes for the first time gets what answers for layers of other ranks, or if it
        is not known yet which these are, at the end of the call."""
        for cache in caches_in(arguments):
            left = getattr(cache, OWN, None)
            if left is None:
                if len(self.slots) == len(self._owners):
                    left = self._join(cache)
                else:
                    self._remember(cache, index, own, arguments)
                    continue
            if not own and left:
                for number in self.slots.get(index, ()):
                    if number in left:
                        _advance(cache, number, _first(arguments).shape)

    def look(self, arguments: Sequence[Any]) -> Any:
        """On the owner, before the first call of a structure: what caches and other objects hold."""
        caches = caches_in(arguments)
        others = [leaf for leaf in arguments if _may_hold_state(leaf)]
        return [(cache, list(map(_state, cache.layers))) for cache in caches], [(one, state_in(one)) for one in others]

    def changes(self, name: str, look: Any) -> tuple[int, ...]:
        """After the call: the layers of caches that the block has updated. Raises UnsupportedError where it keeps
        something that other ranks would need."""
        caches, others = look
        for one, before in others:
            if differences(before, state_in(one)):
                raise UnsupportedError(f"{name} keeps state in a {type(one).__name__}, which other ranks would not see")
        slots = set[int]()
        for cache, before in caches:
            now = list(map(_state, cache.layers))
            slots |= {n for n, state in enumerate(now) if n >= len(before) or differences(before[n], state)}
        return tuple(sorted(slots))

    def learn(self, index: int, slots: tuple[int, ...]) -> None:
        """On every rank: which layers block number `index` updates."""
        self.slots[index] = tuple(sorted({*self.slots.get(index, ()), *slots}))

    def leave(self) -> None:
        """At the end of a call of the model: caches of a first call get what answers for layers of other ranks."""
        for new in self._new:
            left = self._join(new.cache)
            # Blocks that are still to come with it (another group may be in the middle of its call) advance their own.
            for number in sorted({n for index in new.passed for n in self.slots[index]} & left):
                _advance(new.cache, number, new.shape)
        self._new.clear()

    def _remember(self, cache: Any, index: int, own: bool, arguments: Sequence[Any]) -> None:
        new = next((one for one in self._new if one.cache is cache), None)
        if new is None:
            new = NewCache(cache, _first(arguments).shape)
            self._new.append(new)
        if not own:
            new.passed.add(index)

    def _join(self, cache: Any) -> set[int]:
        """Put stand-ins for layers of other ranks into a cache; the numbers of the layers that have none."""
        own = {n for index, numbers in self.slots.items() if self._owners[index] == self._rank for n in numbers}
        foreign = {n for index, numbers in self.slots.items() if self._owners[index] != self._rank for n in numbers}
        if own & foreign:
            raise UnsupportedError(f"blocks of several ranks update layer {min(own & foreign)} of the cache")
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) <= max((*own, *foreign), default=-1):
                cache.layers.append(cache.layer_class_to_replicate())
        left: set[int] = set()
        kinds = {_kind(cache.layers[n]): cache.layers[n] for n in sorted(own, reverse=True)}
        for number in sorted(foreign):
            answering = kinds.get(_kind(cache.layers[number]))
            if answering is None:
                left.add(number)
            else:
                cache.layers[number] = elsewhere(answering)
        setattr(cache, OWN, left)
        return left


def _state(layer: Any) -> State:
    """What tells whether a cache layer was changed since, in place, too."""
    return State() if OWN in vars(layer) else state_in(layer)  # another one answers for it


def caches_in(arguments: Sequence[Any]) -> list[Any]:
    """The caches among the arguments of a block."""
    found = []
    for leaf in arguments:
        if isinstance(leaf, EncoderDecoderCache):
            found += [leaf.self_attention_cache, leaf.cross_attention_cache]
        elif isinstance(leaf, Cache):
            found.append(leaf)
    return found


def _may_hold_state(leaf: Any) -> bool:
    known = (torch.Tensor, Cache, PreTrainedConfig, nn.Module, *PLAIN)
    return not isinstance(leaf, known) and hasattr(leaf, "__dict__") and not callable(leaf)


def _first(arguments: Sequence[Any]) -> torch.Tensor:
    return next(one for one in arguments if isinstance(one, torch.Tensor))


def _kind(layer: Any) -> tuple[Any, ...]:
    """What cache layers have in common that advance together: their class and what it was made with."""
    made_with = [name for name in inspect.signature(type(layer).__init__).parameters if hasattr(layer, name)]
    plain = {name: value for name in made_with if isinstance(value := getattr(layer, name), (bool, int, str))}
    return (type(layer), *sorted(plain.items()))


def _advance(cache: Any, number: int, shape: torch.Size) -> None:
    """Let a layer that another rank updates keep its books. shape: that of the hidden states."""
    layer = cache.layers[number]
    if isinstance(layer, CacheLayerMixin):
        nothing = torch.zeros(shape[0], 1, shape[1], 1)
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
