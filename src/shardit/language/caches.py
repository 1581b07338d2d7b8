"""Caches of keys, values and states over stages: each rank has those of its own layers.

Code outside the blocks also reads cache layers of other ranks: their length, the size of masks. Such reads are
delegated to an own layer of the same kind, in a block of the same class, as all of these advance together. If this rank
has none, the cache layer updates itself with tensors of one head of width 1.
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
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from shardit.core.decoder.shapes import PLAIN
from shardit.core.modules.state.module_state import State, differences, state_in
from shardit.core.runtime.pending import METADATA
from shardit.errors import UnsupportedError

CHANGES = (
    *("reorder_cache", "crop", "reset", "batch_repeat_interleave", "batch_select_indices", "offload", "prefetch"),
    *("lazy_initialization", "lazy_initialization_indexer", "activate_past_recording", "__init__"),
)
"""Methods that change a cache layer; they do nothing on a layer of another rank."""

UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""Methods that a block calls with its results."""

OWN = "_shardit_layer"


@dataclass(eq=False)
class NewCache:
    """A cache in the first call of a model. tokens: see `_tokens`. passed: keys of the calls of blocks of other ranks
    with it."""

    cache: Any
    tokens: tuple[int, ...]
    passed: set[Any] = field(default_factory=set)


class StageCaches:
    """Tracks the caches among the arguments of a decoder's blocks.

    slots[i]: the layers of a cache that block i updates, known after its first call with one. _updated: those that it
    updates in calls of one structure; cross-attention updates its layer in calls with an image only. _complete: whether
    all blocks have had a call with a cache; calls without one show nothing. classes: of the blocks.
    """

    def __init__(self, owners: Sequence[int], rank: int, classes: Sequence[type]):
        self.slots: dict[int, tuple[int, ...]] = {}
        self._updated: dict[Any, tuple[int, ...]] = {}
        self._owners, self._rank, self._classes = owners, rank, classes
        self._new: list[NewCache] = []
        self._complete = False

    def among(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the caches among the arguments of a block."""
        found = []
        for leaf in arguments:
            if isinstance(leaf, EncoderDecoderCache):
                found += [leaf.self_attention_cache, leaf.cross_attention_cache]
            elif isinstance(leaf, Cache):
                found.append(leaf)
        return found

    def before_call(self, caches: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Prepare a block call: a new cache gets stand-ins for layers of other ranks now, or at the end of the call if
        those are not known yet."""
        for cache in caches:
            if getattr(cache, OWN, None) is None:
                if self._complete:
                    self._add_stand_ins(cache)
                elif all(one.cache is not cache for one in self._new):
                    self._new.append(NewCache(cache, _tokens(arguments)))

    def advance(self, key: Any, caches: Sequence[Any], arguments: Sequence[Any]) -> None:
        """Advance the layers that a block of another rank has updated, if they have no stand-in; of a new cache at the
        end of the call."""
        for cache in caches:
            missing = getattr(cache, OWN, None)
            if missing is None:
                next(one for one in self._new if one.cache is cache).passed.add(key)
                continue
            for number in self._updated.get(key, ()) if missing else ():
                if number in missing:
                    _advance(cache, number, _tokens(arguments))

    def snapshot(self, arguments: Sequence[Any]) -> Any:
        """Return the state of caches and other objects, on the owner, before the first call of a structure."""
        caches = self.among(arguments)
        others = [leaf for leaf in arguments if _may_hold_state(leaf)]
        return [(cache, list(map(_state, cache.layers))) for cache in caches], [(one, state_in(one)) for one in others]

    def changes(self, name: str, before: Any) -> tuple[int, ...]:
        """Return the cache layers that the block has updated since the snapshot `before`. Raises UnsupportedError if it
        keeps other state that other ranks would need."""
        caches, others = before
        for one, state in others:
            if differences(state, state_in(one)):
                raise UnsupportedError(f"{name} keeps state in a {type(one).__name__}, which other ranks would not see")
        slots = set[int]()
        for cache, earlier in caches:
            now = list(map(_state, cache.layers))
            slots |= {n for n, state in enumerate(now) if n >= len(earlier) or differences(earlier[n], state)}
        return tuple(sorted(slots))

    def add_slots(self, key: Any, slots: tuple[int, ...]) -> None:
        """Record the cache layers that a block updates in calls of a structure, on every rank."""
        for known, one in ((self.slots, key[0]), (self._updated, key)):
            known[one] = tuple(sorted({*known.get(one, ()), *slots}))

    def end_call(self) -> None:
        """Add stand-ins for layers of other ranks to new caches, at the end of a call of the model."""
        self._complete = self._complete or (len(self.slots) == len(self._owners) and any(self.slots.values()))
        for new in self._new:
            missing = self._add_stand_ins(new.cache)
            # Later blocks (another group may be in the middle of its call) advance their own layers. A block that has
            # failed in its first call has reported none of them.
            for number in sorted({n for key in new.passed for n in self._updated.get(key, ())} & missing):
                _advance(new.cache, number, new.tokens)
        self._new.clear()

    def _add_stand_ins(self, cache: Any) -> set[int]:
        """Add stand-ins for layers of other ranks to a cache. Return the numbers of the layers without a stand-in."""
        own = {n for index, numbers in self.slots.items() if self._owners[index] == self._rank for n in numbers}
        foreign = {n for index, numbers in self.slots.items() if self._owners[index] != self._rank for n in numbers}
        if own & foreign:
            raise UnsupportedError(f"blocks of several ranks update layer {min(own & foreign)} of the cache")
        if cache.layer_class_to_replicate is None:  # a model that is left early has a cache of its first layers
            own, foreign = ({n for n in numbers if n < len(cache.layers)} for numbers in (own, foreign))
        else:
            while len(cache.layers) <= max((*own, *foreign), default=-1):
                cache.layers.append(cache.layer_class_to_replicate())
        self._check_rollback(cache)
        missing: set[int] = set()
        classes = {n: self._classes[index] for index, numbers in self.slots.items() for n in numbers}
        # Layers of cross-attention, though of the same class, do not advance with the others.
        kinds = {(classes[n], _kind(cache.layers[n])): cache.layers[n] for n in sorted(own, reverse=True)}
        for number in sorted(foreign):
            own_layer = kinds.get((classes[number], _kind(cache.layers[number])))
            if own_layer is None:
                missing.add(number)
            else:
                cache.layers[number] = stand_in(own_layer)
        setattr(cache, OWN, missing)
        return missing

    def _check_rollback(self, cache: Any) -> None:
        """Raise UnsupportedError, on all ranks, if a cache has to forget tokens (for assisted decoding) and a stage has
        nothing that shows whether states of other stages can."""
        slots = [(self._owners[i], n) for i, numbers in self.slots.items() for n in numbers if n < len(cache.layers)]
        for stage in sorted(set(self._owners)):
            kinds = {_kind(cache.layers[n]) for owner, n in slots if owner == stage}
            for layer in (cache.layers[n] for _, n in slots):
                recorded = isinstance(layer, LinearAttentionCacheLayerMixin) and layer.record_past
                if recorded and _kind(layer) not in kinds:
                    raise UnsupportedError(
                        f"assisted decoding: stage {stage} has no {type(layer).__name__}, of which other stages have "
                        "some; use another layer_partition or pipeline_parallel_size"
                    )


def _state(layer: Any) -> State:
    """Return the state of a cache layer, to detect changes, also in place; an empty one for a stand-in."""
    return State() if OWN in vars(layer) else state_in(layer)


def _may_hold_state(leaf: Any) -> bool:
    known = (torch.Tensor, Cache, PreTrainedConfig, nn.Module, *PLAIN)
    return not isinstance(leaf, known) and hasattr(leaf, "__dict__") and not callable(leaf)


def _tokens(arguments: Sequence[Any]) -> tuple[int, ...]:
    """Return the numbers of rows and of tokens that a layer is given: the first dims of its hidden states, or the next
    ones if several versions of these lie side by side, as other arguments show."""
    hidden, *others = (tuple(one.shape) for one in arguments if isinstance(one, torch.Tensor))
    pairs = (hidden[:2], hidden[1:3]) if len(hidden) > 3 else (hidden[:2],)
    return next((pair for pair in pairs if any(other[:2] == pair for other in others)), hidden[:2])


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return the key of cache layers that advance together: their class and its arguments."""
    arguments = [name for name in inspect.signature(type(layer).__init__).parameters if hasattr(layer, name)]
    plain = {name: value for name in arguments if isinstance(value := getattr(layer, name), (bool, int, str))}
    return (type(layer), *sorted(plain.items()))


def _advance(cache: Any, number: int, tokens: tuple[int, ...]) -> None:
    """Advance a cache layer that another rank updates. tokens: see `_tokens`."""
    layer = cache.layers[number]
    if isinstance(layer, CacheLayerMixin):
        length = tokens[1]
        if isinstance(layer, StaticLayer) and not layer.is_sliding:  # of cross-attention it is shorter than the text
            length = min(length, layer.max_cache_len - int(layer.get_seq_length()))
        nothing = torch.zeros(tokens[0], 1, length, 1)
        layer.update(nothing, nothing)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for state in list(layer.has_previous_state):
            layer.has_previous_state[state] = True


def is_stand_in(layer: Any) -> bool:
    """Return whether a cache layer is the stand-in of one that another rank has."""
    return OWN in vars(layer)


def delegates(cache: Any) -> tuple[dict[int, int], set[int] | None]:
    """Return for each stand-in of a cache the number of the layer to which it delegates, and the layers of other ranks
    without a stand-in; None for a cache without layers of other ranks. For `add_delegates`."""
    numbers = {id(layer): number for number, layer in enumerate(cache.layers)}
    own = {number: vars(layer)[OWN] for number, layer in enumerate(cache.layers) if is_stand_in(layer)}
    return {number: numbers[id(layer)] for number, layer in own.items()}, getattr(cache, OWN, None)


def add_delegates(cache: Any, like: tuple[dict[int, int], set[int] | None]) -> None:
    """Add the stand-ins of another cache of the model to a cache whose own layers are filled."""
    for number, own in like[0].items():
        cache.layers[number] = stand_in(cache.layers[own])
    if like[1] is not None:
        setattr(cache, OWN, set(like[1]))


class RemoteCacheTensor(torch.Tensor):
    """A tensor of a cache layer of another rank, over that of an own layer: its shape can be read, but not its data."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in METADATA:
            raise UnsupportedError("code outside of the layers reads data of a cache layer that another rank has")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def stand_in(own: Any) -> Any:
    """Return the stand-in of a cache layer of another rank, which delegates to an own layer."""
    return _class_of(type(own))(own)


@functools.cache
def _class_of(cls: type) -> type:
    def __init__(self: Any, own: Any) -> None:
        object.__setattr__(self, OWN, own)

    def __getattr__(self: Any, name: str) -> Any:
        value = getattr(object.__getattribute__(self, OWN), name)
        return value.as_subclass(RemoteCacheTensor) if isinstance(value, torch.Tensor) else value

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
            members[name] = functools.partialmethod(_delegated, name)
    return type(cls.__name__, (cls,), members)


def _delegated(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(getattr(self, OWN), name)(*args, **kwargs)


def _property(name: str, self: Any) -> Any:
    return getattr(getattr(self, OWN), name)


def _refused(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"a layer calls {name} of a cache layer that another rank has")

    return method
