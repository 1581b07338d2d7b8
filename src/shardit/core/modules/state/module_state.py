"""State that modules, attention processors, hooks and functions keep between calls: compared, named, and restored after
a trial call."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_map_only

from shardit.core.modules.fingerprint import PROCESSOR
from shardit.core.modules.hooks import from_outside
from shardit.core.modules.patching import SWAPPED
from shardit.core.modules.state.contents import Content, content_of, fill_nan, nan_like, restore_content, written
from shardit.core.modules.state.holders import (
    COLLECTIONS,
    FIXED,
    FUNCTIONS,
    PLAIN,
    Entries,
    code_of,
    entries,
    is_holder,
    name_of,
    of_library,
    put_entries,
    unpacked,
)
from shardit.core.runtime.randomness import Generator, is_generator
from shardit.core.runtime.storages import storage_key

log = logging.getLogger(__name__)

MAX_HOLDERS = 50_000
"""Maximum number of holders that are read, the nearest ones first; a warning is logged if there are more."""

MAX_DEPTH = 8
"""Maximum depth of the comparison of collections that were created again."""

ARGUMENT = "an argument"
"""The path of objects that a call is given."""


@dataclass(frozen=True)
class HolderState:
    """Entries of a module, an object, a collection, a function with its variables, or a class at one time. outside: it
    is reached only through hooks and functions that users have attached to modules."""

    path: str
    holder: Any
    held: Entries
    outside: bool = False


@dataclass
class State:
    """State reachable from a model or other objects at one time: holders, and contents of tensors, arrays and random
    generators, both by id. copies: whether contents can be restored."""

    copies: bool = True
    holders: dict[int, HolderState] = field(default_factory=dict)
    contents: dict[int, Content] = field(default_factory=dict)

    def outside(self) -> State:
        """Return the part that is reached only through hooks and functions of users."""
        holders = {key: one for key, one in self.holders.items() if one.outside}
        return State(self.copies, holders, {key: one for key, one in self.contents.items() if one.outside})

    def generators(self) -> list[Generator]:
        """Return the random generators in this state."""
        return [one.value for one in self.contents.values() if is_generator(one.value)]

    def add(self, roots: Iterable[tuple[str, Any]], outside: bool = False) -> None:
        """Add all state reachable from `roots` (path, value) that is not recorded yet."""
        todo = deque(roots)
        while todo:
            path, value = todo.popleft()
            if isinstance(value, PLAIN) or id(value) in self.holders or id(value) in self.contents:
                continue
            content = content_of(path, value, self.copies, outside)
            if content is not None:
                self.contents[id(value)] = content
            elif not is_holder(value):
                todo.extend((path, one) for one in unpacked(value))
            elif len(self.holders) >= MAX_HOLDERS:
                text = "more than %d objects are reachable from %s: changes in the rest are not detected"
                log.warning(text, MAX_HOLDERS, path)
                return
            else:
                self._add(path, value, outside, todo)

    def _add(self, path: str, value: Any, outside: bool, todo: deque[tuple[str, Any]]) -> None:
        path = value.__name__ if isinstance(value, type) else path
        held = entries(value)
        self.holders[id(value)] = HolderState(path, value, held, outside)
        later = FUNCTIONS if isinstance(value, nn.Module) and not outside else ()  # see `_attached_code`
        found = [(name_of(path, key), one) for key, one in held.items() if not isinstance(one, (*PLAIN, *later))]
        todo.extend(found)
        todo.extend((name_of(path, key), one) for key, one in code_of(value))


def state_of(model: nn.Module, others: Iterable[Any] = ()) -> State:
    """Return the state of a model's modules and processors, of the hooks and functions that users have attached to
    modules, and of other objects."""
    state = State()
    with without_modes():  # reading is not part of the traced computation
        state.add(model.named_modules())
        state.add((ARGUMENT, one) for one in others)
        state.add(_attached_code(model), outside=True)
    return state


def state_in(thing: Any) -> State:
    """Return the state of one object, for comparison only."""
    state = State(copies=False)
    with without_modes():
        state.add([("", thing)])
    return state


def _attached_code(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Yield users' hooks on a model's modules, global hooks, and functions that replace methods."""
    global_hooks = [*torch_module._global_forward_pre_hooks.values(), *torch_module._global_forward_hooks.values()]
    yield from (("hook", hook) for hook in global_hooks if from_outside(hook))
    for path, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        yield from ((name_of(path, "hook"), hook) for hook in hooks if from_outside(hook))
        for name, value in vars(module).items():
            if isinstance(value, FUNCTIONS):
                yield name_of(path, name), value


def restore(state: State) -> None:
    """Undo all assignments and writes since `state` was read. Raises UnsupportedError if that is not possible."""
    for one in state.holders.values():
        now = entries(one.holder)
        if now.keys() != one.held.keys() or any(now[key] is not value for key, value in one.held.items()):
            put_entries(one.holder, one.held, now)
    with without_modes():
        for content in state.contents.values():
            restore_content(content)


def poison(before: State, after: State) -> None:
    """Overwrite tensors that hooks and functions of users have changed with NaN, so that a result shows whether they
    are read. `restore(after)` undoes it."""
    names = differences(before, after, outside=True)
    for old, new in _common_contents(before, after):
        if new.outside and written(old, new):
            fill_nan(new)
    for one in after.outside().holders.values():
        now = {key: _poisoned(held) if name_of(one.path, key) in names else held for key, held in one.held.items()}
        if any(now[key] is not held for key, held in one.held.items()):
            put_entries(one.holder, now, one.held)


def _poisoned(value: Any) -> Any:
    if not isinstance(value, (torch.Tensor, list, dict, tuple)):
        return value
    return tree_map_only(torch.Tensor, nan_like, value)


def differences(before: State, after: State, outside: bool = False, rewritten: bool = False) -> list[str]:
    """Return the full names of all differences in the later state: other numbers and strings, other objects,
    collections with changed members, contents that were written to. `outside`: compare the part that is reached only
    through users' hooks and functions, instead of the rest. `rewritten`: tensors of objects among the arguments differ
    by their values, so a call may make the same ones again (a cache of keys that each call fills)."""
    found: dict[str, None] = {}
    for key, new in after.holders.items():
        old = before.holders.get(key)
        if old is not None and new.outside == outside:
            for name in {**old.held, **new.held}:
                both = name in old.held and name in new.held
                same = both and _alike(old.held[name], new.held[name], before, after)
                if not same and rewritten and both and new.path.startswith(ARGUMENT):
                    same = same_numbers(old.held[name], new.held[name])
                if not same:
                    found[name_of(new.path, name)] = None
    for old, new in _common_contents(before, after):
        if new.outside == outside and written(old, new):
            found[new.path] = None
    return [*found]


def same_numbers(one: Any, other: Any) -> bool:
    """Return whether two values are tensors of the same dtype, on one device, with data, and equal."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.is_meta:
        return False
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def unversioned_writes(before: State, after: State) -> list[str]:
    """Return the full names of contents that changed without a new version: writing the same values again would go
    undetected."""
    found = (new for old, new in _common_contents(before, after) if old.version == new.version and written(old, new))
    return [new.path for new in found if not new.outside]


def late_changes(before: State, after: State) -> list[str]:
    """Return the full names of all changes by calls, except objects that pipelines replace between calls: objects of
    libraries, attention processors."""
    holders = (*before.holders.values(), *after.holders.values())
    others = {name_of(one.path, key) for one in holders for key, value in one.held.items() if of_library(value)}
    return [name for name in differences(before, after) if name not in others and not name.endswith(PROCESSOR)]


def split_classes(before: State, after: State) -> list[str]:
    """Return the full names of attributes that were set on classes derived by this package. Modules that shared one
    class originally now have several."""
    names = [name_of(cls.path, key) for cls in _derived(after) for key in cls.held]
    return [name for name in differences(before, after) if name in names]


def _derived(state: State) -> Iterable[HolderState]:
    classes = (one for one in state.holders.values() if isinstance(one.holder, type))
    return (one for one in classes if SWAPPED in vars(one.holder))


def _common_contents(before: State, after: State) -> Iterable[tuple[Content, Content]]:
    return ((old, after.contents[key]) for key, old in before.contents.items() if key in after.contents)


def _alike(one: Any, other: Any, before: State, after: State, depth: int = MAX_DEPTH) -> bool:
    """Return whether two values are one object, equal numbers or strings, or collections of such. Floats may differ in
    the last bit: a scale may have been applied and removed."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and one.is_meta and isinstance(other, torch.Tensor):
        return True  # a parameter that its owner has sent in the meantime
    if type(one) is not type(other) or not depth:
        return False
    if isinstance(one, (*COLLECTIONS, *FIXED)):
        a, b = _members(one, before), _members(other, after)
        return a.keys() == b.keys() and all(_alike(a[key], b[key], before, after, depth - 1) for key in a)
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-9) or (one != one and other != other)
    return isinstance(one, (*PLAIN, MethodType)) and bool(one == other)


def _members(collection: Any, state: State) -> Entries:
    known = state.holders.get(id(collection))
    return known.held if known else entries(collection) if is_holder(collection) else dict(enumerate(collection))


def new_values(before: State, after: State) -> list[torch.Tensor]:
    """Return the tensors that modules and processors have set, added or written to (copies of the latter), and the
    floats that they have set."""
    found = []
    with without_modes():
        for key, new in after.contents.items():
            old = before.contents.get(key)
            if isinstance(new.value, torch.Tensor) and not new.outside and (old is None or written(old, new)):
                found.append(new.value if old is None else new.value.detach().clone())
    for key, state in after.holders.items():
        known = before.holders[key].held if key in before.holders else {}
        floats = {} if state.outside else {name: one for name, one in state.held.items() if isinstance(one, float)}
        found += [torch.tensor(one) for name, one in floats.items() if known.get(name) != one]
    return found


def copy_aliases(state: State, value: Any) -> Any:
    """Return a value with copies of its tensors that share memory with the state: `restore` writes to that memory."""
    kept = {storage_key(one.value) for one in state.contents.values() if isinstance(one.value, torch.Tensor)}
    return tree_map_only(torch.Tensor, lambda one: one.clone() if storage_key(one) in kept else one, value)
