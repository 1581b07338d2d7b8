"""Fingerprint of a model's modules, taken when it is sharded, to detect later changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from torch import nn

from shardit.core.modules.hooks import from_outside
from shardit.core.modules.patching import plain_type
from shardit.core.modules.snapshot import NOTHING, Difference, Snapshot, is_object

PROCESSOR = "processor"
"""Attribute of an attention module that holds the code that computes it."""

FORWARD = "forward"
"""Name of the method that a module computes with, in its class or on the instance."""

ON_INSTANCE = (FORWARD, "_compiled_call_impl", PROCESSOR)
"""Attributes of a module that decide how it computes: a forward that replaces that of its class (set by a hook), the
call compiled by torch.compile, and its attention processor."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Attributes of a module that hold the functions called before and after its forward."""

CLASS = "class"
"""Name of a change of a module's class."""


@dataclass(frozen=True)
class Change:
    """One difference: the name of the module, that of the attribute, and its values before and now (None if absent).
    home: the class whose member changed; None for an attribute of the module itself."""

    module: str
    name: str
    before: Any
    now: Any
    home: type | None = None

    @property
    def path(self) -> str:
        """Return the full name."""
        return f"{self.module}.{self.name}" if self.module else self.name


class Fingerprint:
    """The submodules of a model, by identity, and how each computes: its class, all members of the class, and the
    attributes of the module that replace them. Values of parameters are not included.

    with_settings: names of modules whose settings (`is_setting`) are included, with those of their attention
    processors.

    `changed` takes about 0.2 ms for a thousand modules, since it compares whole dicts and lists, which compare
    identities first. A pipeline calls it once per call.
    """

    def __init__(self, model: nn.Module, with_settings: Iterable[str] = ()):
        named = list(model.named_modules(remove_duplicate=False))
        self._names = [name for name, _ in named]
        self._own = [vars(module) for _, module in named]  # these dicts live as long as their modules
        self._children = [own["_modules"] for own in self._own]
        self._modules = [module for _, module in named]
        self._classes = list(map(type, self._modules))
        self._plain = {cls: plain_type(cls) for cls in self._classes}
        self._before = [dict(children) for children in self._children], self._overrides()
        self._detail = [self._entries(own) for own in self._own]
        self._hooks = [own[kind] for own in self._own for kind in HOOKS]
        self._hooks_before = list(map(dict, self._hooks))
        self._hooks_of_users = self._user_hooks()
        self._processors = [own[PROCESSOR] for own in self._own if own.get(PROCESSOR) is not None]
        kinds = dict.fromkeys([*self._classes, *map(type, self._processors)])
        self._members = Snapshot(dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base is not object))
        self._configured = dict(self._settings_of(with_settings))
        self._settings = Snapshot(self._configured.values())
        self._noted: list[Difference] = []  # of settings, before the model's own code last ran

    def _settings_of(self, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the dicts with settings, by the names of their modules, processors and other objects in public
        attributes of modules, each once."""
        found, seen = dict(zip(self._names, self._own, strict=True)), set[int]()
        for name in names:
            processor = found[name].get(PROCESSOR)
            plain = not isinstance(processor, nn.Module) and hasattr(processor, "__dict__")
            of_processor = [vars(processor)] if plain else []
            for path, own in zip((name, f"{name}.{PROCESSOR}"), (found[name], *of_processor), strict=False):
                if id(own) not in seen:
                    seen.add(id(own))
                    yield path, own
            for attribute, value in sorted(found[name].items()):
                if not attribute.startswith("_") and is_object(value) and id(vars(value)) not in seen:
                    seen.add(id(vars(value)))
                    yield f"{name}.{attribute}", vars(value)

    def changed(self) -> bool:
        """Return whether the model may differ from this fingerprint."""
        if self._classes != list(map(type, self._modules)) or self._members.changed():
            return True
        if self._noted or self._settings.changed():
            return True
        return (self._children, self._overrides()) != self._before or self._user_hooks() != self._hooks_of_users

    def changes(self) -> list[Change]:
        """Return the differences, in order of names. Modules below a replaced module are not compared."""
        found = [
            Change(name, key, before.get(key), now.get(key))
            for name, own, before in zip(self._names, self._own, self._detail, strict=True)
            for now in [self._entries(own)]
            for key in {**before, **now}
            if before.get(key) is not now.get(key)
        ]
        members = self._members.differences()
        for name, module, cls in zip(self._names, self._modules, self._classes, strict=True):
            was, now_class = self._plain[cls], plain_type(type(module))
            if was is not now_class:
                found.append(Change(name, CLASS, was, now_class))
            processor = vars(module).get(PROCESSOR)
            of_processor = {} if isinstance(processor, nn.Module) else {f"{name}.{PROCESSOR}": type(processor)}
            for path, kind in {name: type(module), **of_processor}.items() if members else ():
                found += [Change(path, d.name, d.before, d.now, d.holder) for d in members if d.holder in kind.__mro__]
        names = list(self._configured)
        found += [Change(names[d.number], d.name, d.before, d.now) for d in (*self._noted, *self._other_settings())]
        before, now = self._hooks_of_users, self._user_hooks()
        others = sorted({*before} ^ {*now})  # in the same order on every rank
        found += [Change(name, "hooks", None, None) for name, _ in others]
        if not found:  # only classes that this package has derived since
            self._classes = list(map(type, self._modules))
            self._plain = {cls: plain_type(cls) for cls in self._classes}
            self._members.update()
            self._settings.update()
        return found

    def update_settings(self) -> None:
        """Replace the known settings by the present ones: a forward may count its calls in one."""
        self._noted.clear()
        self._settings.update()

    @contextmanager
    def own_code(self) -> Iterator[None]:
        """Count no change of settings meanwhile: the model's own code runs, perhaps on one rank only. Earlier changes
        stay noted."""
        self._noted += [found.kept() for found in self._other_settings()]
        self._settings.update()
        try:
            yield
        finally:
            self._settings.update()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the model for a while, for calls that began before it was changed."""
        entries = [*self._members.differences(), *self._other_settings()]
        for key, before in zip(ON_INSTANCE, self._before[1], strict=True):
            pairs = zip(self._own, before, strict=True)
            others = [(own, NOTHING if was is None else was) for own, was in pairs if own.get(key) is not was]
            entries += [Difference(0, own, key, was, own.get(key, NOTHING)) for own, was in others]
        places = *zip(self._children, self._before[0], strict=True), *zip(self._hooks, self._hooks_before, strict=True)
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
        """Return the names of modules with users' forward hooks, once per hook; "" is the model."""
        return [name for name, _ in self._user_hooks()]

    def processors_outside(self, libraries: tuple[str, ...]) -> bool:
        """Return whether the code of an attention processor is in none of these libraries (prefixes of modules)."""
        return any(not type(one).__module__.startswith(libraries) for one in self._processors)

    def training(self) -> bool:
        """Return whether any of the modules is in training mode."""
        return any(map(operator.itemgetter("training"), self._own))

    def _user_hooks(self) -> list[tuple[str, int]]:
        """Return users' hooks as pairs: the name of the module and the id that torch assigned."""
        if not any(self._hooks):
            return []
        found = ((i // 2, key, hook) for i, hooks in enumerate(self._hooks) for key, hook in hooks.items())
        return [(self._names[number], key) for number, key, hook in found if from_outside(hook)]

    def _overrides(self) -> list[list[Any]]:
        return [list(map(dict.get, self._own, repeat(name))) for name in ON_INSTANCE]

    def _other_settings(self) -> list[Difference]:
        return [found for found in self._settings.differences() if found.name not in ON_INSTANCE]

    @staticmethod
    def _entries(own: dict[str, Any]) -> dict[str, Any]:
        return {**own["_modules"], **{name: own[name] for name in ON_INSTANCE if own.get(name) is not None}}
