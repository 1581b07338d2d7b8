"""The modules of a model, noted when it is sharded, so that later changes are noticed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from torch import nn

from shardit.core.modules.hooks import from_outside
from shardit.core.modules.kept import NOTHING, Difference, Kept, is_object
from shardit.core.modules.patching import plain_type

PROCESSOR = "processor"
"""The attribute in which an attention module has the code that computes it."""

FORWARD = "forward"
"""The name of what a module computes, in its class or in place of it."""

ON_INSTANCE = (FORWARD, "_compiled_call_impl", PROCESSOR)
"""Attributes of a module that say how it computes: its forward if one was put in place of its class's (by a hook), what
torch.compile has made of its call, and its attention processor."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Attributes of a module that hold what is called before and after its forward."""

CLASS = "class"
"""The name of a change: a module became one of another class."""


@dataclass(frozen=True)
class Change:
    """One thing that differs: the module that has it, its name, and what it was and is (None where there is none).
    home: the class whose member it is; None for what the module has itself."""

    module: str
    name: str
    before: Any
    now: Any
    home: type | None = None

    @property
    def path(self) -> str:
        """The full name."""
        return f"{self.module}.{self.name}" if self.module else self.name


class Fingerprint:
    """The submodules of a model, by identity, and how each computes: its class, with all members of this, and what the
    module has in place of them. Values of parameters are no part of it.

    set_up: names of modules whose settings count, and those of their attention processors (`is_setting`).

    `changed` takes about 0.2 ms for a thousand modules, since it compares whole dicts and lists, which look at
    identities first: a pipeline asks it once in each call.
    """

    def __init__(self, model: nn.Module, set_up: Iterable[str] = ()):
        named = list(model.named_modules(remove_duplicate=False))
        self._names = [name for name, _ in named]
        self._own = [vars(module) for _, module in named]  # these dicts live as long as their modules
        self._children = [own["_modules"] for own in self._own]
        self._modules = [module for _, module in named]
        self._classes = list(map(type, self._modules))
        self._plain = {cls: plain_type(cls) for cls in self._classes}
        self._taken = [dict(children) for children in self._children], self._ways()
        self._detail = [self._look(own) for own in self._own]
        self._hooks = [own[kind] for own in self._own for kind in HOOKS]
        self._hooks_before = list(map(dict, self._hooks))
        self._hooked = self._outside()
        processors = [own[PROCESSOR] for own in self._own if own.get(PROCESSOR) is not None]
        kinds = dict.fromkeys([*self._classes, *map(type, processors)])
        self._members = Kept(dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base is not object))
        self._set_up = dict(self._with_settings(set_up))
        self._settings = Kept(self._set_up.values())

    def _with_settings(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the dicts with settings, by the names of their modules, processors and other objects in attributes of
        modules, each once."""
        found, seen = dict(zip(self._names, self._own, strict=True)), set[int]()
        for name in names:
            processor = found[name].get(PROCESSOR)
            beside = [] if isinstance(processor, nn.Module) or not hasattr(processor, "__dict__") else [vars(processor)]
            for path, own in zip((name, f"{name}.{PROCESSOR}"), (found[name], *beside), strict=False):
                if id(own) not in seen:
                    seen.add(id(own))
                    yield path, own
            for attribute, value in sorted(found[name].items()):
                if is_object(value) and id(vars(value)) not in seen:
                    seen.add(id(vars(value)))
                    yield f"{name}.{attribute}", vars(value)

    def changed(self) -> bool:
        """Return whether anything may differ from when this was taken."""
        if self._classes != list(map(type, self._modules)) or self._members.changed() or self._settings.changed():
            return True
        return (self._children, self._ways()) != self._taken or self._outside() != self._hooked

    def changes(self) -> list[Change]:
        """What differs, in order of names. Below a module that was replaced nothing is looked at."""
        found = [
            Change(name, key, before.get(key), now.get(key))
            for name, own, before in zip(self._names, self._own, self._detail, strict=True)
            for now in [self._look(own)]
            for key in {**before, **now}
            if before.get(key) is not now.get(key)
        ]
        members = self._members.differences()
        for name, module, cls in zip(self._names, self._modules, self._classes, strict=True):
            was, now_class = self._plain[cls], plain_type(type(module))
            if was is not now_class:
                found.append(Change(name, CLASS, was, now_class))
            processor = vars(module).get(PROCESSOR)
            beside = {} if isinstance(processor, nn.Module) else {f"{name}.{PROCESSOR}": type(processor)}
            for path, kind in {name: type(module), **beside}.items() if members else ():
                found += [Change(path, d.name, d.before, d.now, d.holder) for d in members if d.holder in kind.__mro__]
        names = list(self._set_up)
        found += [Change(names[d.number], d.name, d.before, d.now) for d in self._other_settings()]
        before, now = self._hooked, self._outside()
        others = sorted({*before} ^ {*now})  # in the same order on every rank
        found += [Change(name, "hooks", None, None) for name, _ in others]
        if not found:  # classes that this package has derived since
            self._classes = list(map(type, self._modules))
            self._plain = {cls: plain_type(cls) for cls in self._classes}
            self._members.take()
            self._settings.take()
        return found

    def take_settings(self) -> None:
        """Take the settings as they are now for what is right: a forward may count its calls in one."""
        self._settings.take()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the model back as it was for a while, for calls that began before it was changed."""
        entries = [*self._members.differences(), *self._other_settings()]
        for key, before in zip(ON_INSTANCE, self._taken[1], strict=True):
            pairs = zip(self._own, before, strict=True)
            others = [(own, NOTHING if was is None else was) for own, was in pairs if own.get(key) is not was]
            entries += [Difference(0, own, key, was, own.get(key, NOTHING)) for own, was in others]
        places = *zip(self._children, self._taken[0], strict=True), *zip(self._hooks, self._hooks_before, strict=True)
        contents = [(place, before, dict(place)) for place, before in places if place != before]
        classes = [(m, cls, type(m)) for m, cls in zip(self._modules, self._classes, strict=True) if type(m) is not cls]

        def put(earlier: bool) -> None:
            for entry in entries:
                entry.set(entry.before if earlier else entry.now)
            for place, before, now in contents:
                place.clear()
                place.update(before if earlier else now)
            for module, before, now in classes:
                module.__class__ = before if earlier else now

        put(earlier=True)
        try:
            yield
        finally:
            put(earlier=False)

    def hooked(self) -> list[str]:
        """The names of the modules that have forward hooks from outside, each once for every hook; "" is the model."""
        return [name for name, _ in self._outside()]

    def training(self) -> bool:
        """Whether any of the modules is in training mode."""
        return any(map(operator.itemgetter("training"), self._own))

    def _outside(self) -> list[tuple[str, int]]:
        """The hooks from outside, by the name of the module and the number that torch gave them."""
        if not any(self._hooks):
            return []
        found = ((i // 2, key, hook) for i, hooks in enumerate(self._hooks) for key, hook in hooks.items())
        return [(self._names[number], key) for number, key, hook in found if from_outside(hook)]

    def _ways(self) -> list[list[Any]]:
        return [list(map(dict.get, self._own, repeat(name))) for name in ON_INSTANCE]

    def _other_settings(self) -> list[Difference]:
        return [found for found in self._settings.differences() if found.name not in ON_INSTANCE]

    @staticmethod
    def _look(own: dict[str, Any]) -> dict[str, Any]:
        return {**own["_modules"], **{name: own[name] for name in ON_INSTANCE if own.get(name) is not None}}
