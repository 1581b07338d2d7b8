"""Patches modules in place: derives subclasses, replaces tensors."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from shardit.errors import UnsupportedError

SWAPPED = "shardit_swapped"
"""Attribute of the classes derived here: names of members that override those of the original class."""


def subclass_in_place(module: Any, members: dict[str, Any], late: Collection[str] = ()) -> None:
    """Change a module's class in place to a subclass with the same name and the given members.

    The subclass is not a wrapper: names, indices, isinstance, LoRA keys and checkpoints are unchanged. It overrides
    `__call__`, outside everything that replaces `forward` (compile, accelerate and cache hooks). late: names of members
    that look up the original ones when called, so later changes of those take effect.
    """
    cls = type(module)
    known = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    hiding = frozenset(members.keys() - set(late))
    module.__class__ = type(cls.__name__, (cls,), {**known, **members, SWAPPED: hiding})


CHANGE = ("set_", "load_", "_load_", "unload_", "fuse_", "unfuse_", "enable_", "disable_", "delete_", "add_")
"""Name prefixes of methods that change the computation of a model."""


def changing_methods(cls: type, first: Callable[[], None]) -> dict[str, Callable[..., Any]]:
    """Return the methods of a class that change its computation, each preceded by a call of `first`: calls in flight
    use the model before the change."""

    def method(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def change(self: Any, *args: Any, **kwargs: Any) -> Any:
            first()
            return own(self, *args, **kwargs)

        return change

    names = [name for name in dir(cls) if name.startswith(CHANGE) and not hasattr(nn.Module, name)]
    found = {name: getattr(cls, name) for name in names}
    plain = {name: own for name, own in found.items() if inspect.isfunction(own)}
    return {name: method(own) for name, own in plain.items()}


def plain_class(thing: Any) -> type:
    """Return the class that an object had before `subclass_in_place`."""
    return plain_type(type(thing))


def plain_type(cls: type) -> type:
    """Return the class from which `subclass_in_place` derived another."""
    return next(one for one in cls.__mro__ if SWAPPED not in vars(one))


def hides(cls: type, home: type, name: str) -> bool:
    """Return whether a change of a member of `home`, a base of `cls`, conflicts with a class derived here: it has no
    effect, or it replaced the member of the derived class."""
    bases = cls.__mro__
    for place, made in enumerate(bases):
        if name in vars(made).get(SWAPPED, ()) and home in bases[place:]:
            between = bases[place + 1 : bases.index(home)]
            if not any(name in vars(base) for base in between):
                return True
    return False


Subclasses = dict[tuple[Any, ...], type]
"""Classes derived by `share_subclass`, by original class and key."""


def share_subclass(module: Any, known: Subclasses, key: tuple[Any, ...], members: Callable[[], dict[str, Any]]) -> None:
    """Change a class like `subclass_in_place`, once per class and key, so that its modules share compiled code."""
    key = (type(module), *key)
    if key not in known:
        subclass_in_place(module, members())
        known[key] = type(module)
    module.__class__ = known[key]


NUMBERS = "shardit_numbers"
"""Attribute of a class that `number_calls` derived: the numbers of its modules, and of others of the same sequence."""


def number_calls(modules: Sequence[nn.Module], made: Callable[[Any, Mapping[nn.Module, int]], Any]) -> None:
    """Give modules a `__call__` that knows their number in the sequence: `made` makes it once per class, of the class's
    own and the numbers of all modules. Copies of modules have none before `number_copies`."""
    numbers, known = weakref.WeakKeyDictionary({module: n for n, module in enumerate(modules)}), Subclasses()
    for module in modules:
        members = {"__call__": made(type(module).__call__, numbers), NUMBERS: numbers}
        share_subclass(module, known, (), functools.partial(dict[str, Any], members))


def number_copies(module: nn.Module, copied: nn.Module) -> None:
    """Give the parts of a deep copy the numbers of the parts of the module, so that their calls are handled alike."""
    for part, other in zip(module.modules(), copied.modules(), strict=True):
        for numbers in _numbers(part):
            numbers[other] = numbers[part]


def is_numbered(module: nn.Module) -> bool:
    """Return whether a class of a module, perhaps a base of its present one, was derived by `number_calls` for it."""
    return any(True for _ in _numbers(module))


def _numbers(module: nn.Module) -> Iterator[MutableMapping[nn.Module, int]]:
    for cls in type(module).__mro__:
        if module in (numbers := vars(cls).get(NUMBERS, {})):
            yield numbers


def fixed_device_to(plain: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return a `to` for modules that are partly on meta on some rank: it allows changes of dtype and refuses moves, on
    every rank alike."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found: Any = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        target, dtype, _, layout = found
        if target is not None and target.type != device.type:
            raise UnsupportedError("a parallel model cannot be moved: choose the device when it is made parallel")
        changes = {"dtype": dtype, "memory_format": layout}
        changes = {name: value for name, value in changes.items() if value is not None}
        return plain(self, **changes) if changes else self

    return to


def set_tensor(module: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or a buffer of a module, or of one of its submodules, by another of the same kind."""
    *parents, leaf = path.split(".")
    for name in parents:
        module = getattr(module, name)
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
