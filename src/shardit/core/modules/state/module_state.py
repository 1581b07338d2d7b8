"""State that modules, attention processors, hooks and functions keep from call to call: put back after a trial,
compared, named."""

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
from shardit.core.modules.state.contents import Content, content_of, put_back, spoil, spoilt, written
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

MOST = 50_000
"""Things that are looked at, the nearest ones first; a warning says that there are more."""

NESTED = 8
"""How deep collections are compared that were made again."""


@dataclass(frozen=True)
class Thing:
    """A module, an object, a collection, a function with its variables, or a class: what it held at one time. outside:
    it is reached only through hooks and functions that users have put on modules."""

    path: str
    holder: Any
    held: Entries
    outside: bool = False


@dataclass
class State:
    """All that is reached from a model or other objects at one time: things by id, and by id the contents of tensors,
    arrays and random generators. copies: whether contents can be put back."""

    copies: bool = True
    things: dict[int, Thing] = field(default_factory=dict)
    contents: dict[int, Content] = field(default_factory=dict)

    def outside(self) -> State:
        """The part that is reached only through hooks and functions of users."""
        things = {key: thing for key, thing in self.things.items() if thing.outside}
        return State(self.copies, things, {key: one for key, one in self.contents.items() if one.outside})

    def generators(self) -> list[Generator]:
        """The random generators that were found."""
        return [one.value for one in self.contents.values() if is_generator(one.value)]

    def look(self, roots: Iterable[tuple[str, Any]], outside: bool = False) -> None:
        """Add what is reached from some values and is not known yet."""
        todo = deque(roots)
        while todo:
            path, value = todo.popleft()
            if isinstance(value, PLAIN) or id(value) in self.things or id(value) in self.contents:
                continue
            content = content_of(path, value, self.copies, outside)
            if content is not None:
                self.contents[id(value)] = content
            elif not is_holder(value):
                todo.extend((path, one) for one in unpacked(value))
            elif len(self.things) >= MOST:
                log.warning("more than %d objects are reached from %s: changes in the rest are not seen", MOST, path)
                return
            else:
                self._add(path, value, outside, todo)

    def _add(self, path: str, value: Any, outside: bool, todo: deque[tuple[str, Any]]) -> None:
        path = value.__name__ if isinstance(value, type) else path
        held = entries(value)
        self.things[id(value)] = Thing(path, value, held, outside)
        later = FUNCTIONS if isinstance(value, nn.Module) and not outside else ()  # what was put on modules
        found = [(name_of(path, key), one) for key, one in held.items() if not isinstance(one, (*PLAIN, *later))]
        todo.extend(found)
        todo.extend((name_of(path, key), one) for key, one in code_of(value))


def state_of(model: nn.Module, others: Iterable[Any] = ()) -> State:
    """What a model's modules and their processors keep, with all that these have, what hooks and functions that users
    have put on modules know, and what other objects have."""
    state = State()
    with without_modes():  # that watch what a forward computes
        state.look(model.named_modules())
        state.look(("an argument", one) for one in others)
        state.look(_put_on(model), outside=True)
    return state


def state_in(thing: Any) -> State:
    """What one object keeps, to be compared only."""
    state = State(copies=False)
    with without_modes():
        state.look([("", thing)])
    return state


def _put_on(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """The hooks on a model's modules and on all modules, and functions in place of methods."""
    everywhere = [*torch_module._global_forward_pre_hooks.values(), *torch_module._global_forward_hooks.values()]
    yield from (("hook", hook) for hook in everywhere if from_outside(hook))
    for path, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        yield from ((name_of(path, "hook"), hook) for hook in hooks if from_outside(hook))
        for name, value in vars(module).items():
            if isinstance(value, FUNCTIONS):
                yield name_of(path, name), value


def restore(state: State) -> None:
    """Undo what was set, put in and written since. Raises UnsupportedError where something cannot be undone."""
    for thing in state.things.values():
        now = entries(thing.holder)
        if now.keys() != thing.held.keys() or any(now[key] is not value for key, value in thing.held.items()):
            put_entries(thing.holder, thing.held, now)
    with without_modes():
        for content in state.contents.values():
            put_back(content)


def poison(before: State, after: State) -> None:
    """Put NaN in place of all numbers in the tensors of what hooks and functions of users have changed in between, so
    that a result shows whether they are read. `restore` of the later state brings them back."""
    names = differences(before, after, outside=True)
    for old, new in _both(before, after):
        if new.outside and written(old, new):
            spoil(new)
    for thing in after.outside().things.values():
        now = {key: _bad(one) if name_of(thing.path, key) in names else one for key, one in thing.held.items()}
        if any(now[key] is not one for key, one in thing.held.items()):
            put_entries(thing.holder, now, thing.held)


def _bad(value: Any) -> Any:
    if not isinstance(value, (torch.Tensor, list, dict, tuple)):
        return value
    return tree_map_only(torch.Tensor, spoilt, value)


def differences(before: State, after: State, outside: bool = False) -> list[str]:
    """The full names of what is different in the later state: other numbers and texts, other objects, collections of
    others, contents that were written to. `outside`: those of things that are `outside`, in place of the others."""
    found: dict[str, None] = {}
    for key, new in after.things.items():
        old = before.things.get(key)
        if old is not None and new.outside == outside:
            for name in {**old.held, **new.held}:
                both = name in old.held and name in new.held
                if not both or not _alike(old.held[name], new.held[name], before, after):
                    found[name_of(new.path, name)] = None
    for old, new in _both(before, after):
        if new.outside == outside and written(old, new):
            found[new.path] = None
    return [*found]


def unmarked(before: State, after: State) -> list[str]:
    """The full names of contents that were changed while nothing counted it: when the same is written again, nobody
    sees it."""
    found = (new for old, new in _both(before, after) if old.version == new.version and written(old, new))
    return [new.path for new in found if not new.outside]


def late_changes(before: State, after: State) -> list[str]:
    """The full names of what calls have changed, without what pipelines exchange between them: objects of libraries,
    attention processors."""
    things = (*before.things.values(), *after.things.values())
    others = {name_of(one.path, key) for one in things for key, value in one.held.items() if of_library(value)}
    return [name for name in differences(before, after) if name not in others and not name.endswith(PROCESSOR)]


def split_classes(before: State, after: State) -> list[str]:
    """The full names of attributes that were set on classes that this package has derived. Modules that have shared
    one class have several of these."""
    names = [name_of(cls.path, key) for cls in _derived(after) for key in cls.held]
    return [name for name in differences(before, after) if name in names]


def _derived(state: State) -> Iterable[Thing]:
    classes = (thing for thing in state.things.values() if isinstance(thing.holder, type))
    return (thing for thing in classes if SWAPPED in vars(thing.holder))


def _both(before: State, after: State) -> Iterable[tuple[Content, Content]]:
    return ((old, after.contents[key]) for key, old in before.contents.items() if key in after.contents)


def _alike(one: Any, other: Any, before: State, after: State, depth: int = NESTED) -> bool:
    """Whether two values are one object, the same numbers or texts, or collections of such. What was multiplied and
    divided again by a scale may differ in its last bit."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and one.is_meta and isinstance(other, torch.Tensor):
        return True  # a parameter that its owner has shared meanwhile
    if type(one) is not type(other) or not depth:
        return False
    if isinstance(one, (*COLLECTIONS, *FIXED)):
        a, b = _members(one, before), _members(other, after)
        return a.keys() == b.keys() and all(_alike(a[key], b[key], before, after, depth - 1) for key in a)
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-9) or (one != one and other != other)
    return isinstance(one, (*PLAIN, MethodType)) and bool(one == other)


def _members(collection: Any, state: State) -> Entries:
    known = state.things.get(id(collection))
    return known.held if known else entries(collection) if is_holder(collection) else dict(enumerate(collection))


def new_values(before: State, after: State) -> list[torch.Tensor]:
    """The tensors that modules and processors have set, put in or written to in between (of the latter copies), and
    the floats."""
    found = []
    with without_modes():
        for key, new in after.contents.items():
            old = before.contents.get(key)
            if isinstance(new.value, torch.Tensor) and not new.outside and (old is None or written(old, new)):
                found.append(new.value if old is None else new.value.detach().clone())
    for key, thing in after.things.items():
        known = before.things[key].held if key in before.things else {}
        floats = {} if thing.outside else {name: one for name, one in thing.held.items() if isinstance(one, float)}
        found += [torch.tensor(one) for name, one in floats.items() if known.get(name) != one]
    return found


def apart(state: State, value: Any) -> Any:
    """A value with copies in place of those of its tensors whose memory the state has, too: `restore` writes there."""
    kept = {storage_key(one.value) for one in state.contents.values() if isinstance(one.value, torch.Tensor)}
    return tree_map_only(torch.Tensor, lambda one: one.clone() if storage_key(one) in kept else one, value)
