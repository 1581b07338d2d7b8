"""Intercepts calls and attribute reads of a component, and of its parts, by code outside.

While a method of the component runs on its owner, all modules have their own classes. Otherwise the parts that were
reached have an interceptor. A part gets its interceptor when it is read from its parent (`vae.decoder`); all other
parts stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardit.core.comm.agreement import Caller
from shardit.core.modules.absent import listed_by_user
from shardit.core.modules.compiled import COMPILED, refuse_compiling
from shardit.core.modules.hooks import hooks_below
from shardit.core.modules.patching import CHANGE, SWAPPED, fixed_device_to, subclass_in_place
from shardit.core.runtime.digests import named
from shardit.core.runtime.no_gradients import refuse_gradients
from shardit.core.runtime.pending import PendingSource, PendingTensor, is_read_parameter, materialize
from shardit.core.runtime.randomness import GENERATORS, DrawsWithoutData
from shardit.errors import UnsupportedError

_TENSORS_OF, _PARTS_OF = ("named_parameters", "named_buffers"), ("named_modules", "named_children")
"""Methods of modules that list their tensors and their parts."""

ALWAYS = ("__call__", "forward", "generate")
"""Methods that compute for any arguments; `generate` of transformers is defined next to the models."""

DEPTH = 3
"""Maximum depth of the search for pending tensors in objects of unknown types."""

Function = Callable[..., Any]

Run = Callable[[str, str, Function, tuple[Any, ...], dict[str, Any]], Any]
"""Handler of a call from outside. Arguments: the names of the part ("" for the component) and of its method, the bound
method, and its positional and keyword arguments without pending tensors."""

Read = Callable[[str, torch.Tensor], torch.Tensor]
"""Returns the tensor that code outside gets for a parameter or a buffer, by its name in the component."""

Turn = Callable[[], AbstractContextManager[Caller | None]]
"""Encloses a call in which all ranks take part; gives the caller, None for a request, which the session compares."""


def unbound() -> AbstractContextManager[None]:
    """The `Turn` of a component that is used by requests only."""
    return nullcontext()


@dataclass(eq=False)
class Boundary:
    """One component with its interceptors.

    on_all: `run` runs a method on every rank, so hooks are called there. turn: see `Turn`; of a call by a user's own
    program the arguments are compared, and as only some ranks may use the result (to save it, say), it is sent
    immediately.
    inside: one of its methods is running, and interceptors call through. reached: the parts with an interceptor, by
    name. libraries: prefixes of Python modules whose code is given the component's own tensors when it lists
    them; None: all code is. own_code: encloses each run of a method.
    """

    device: torch.device
    run: Run
    read: Read
    on_all: bool = False
    turn: Turn = unbound
    inside: bool = False
    reached: list[tuple[str, nn.Module]] = field(default_factory=list)
    libraries: tuple[str, ...] | None = None
    own_code: Callable[[], AbstractContextManager[None]] = nullcontext
    _plain: list[tuple[nn.Module, type]] = field(default_factory=list)

    def install(self, module: nn.Module, path: str) -> None:
        """Install the interceptor on a part, in place, and on the elements of a list of parts."""
        if any(module is known for known, _ in self._plain):
            return
        cls = type(module)
        self._plain.append((module, cls))
        self.reached.append((path, module))
        computed = {name: self._method(path, name, plain, cls) for name, plain in computing(cls).items()}
        members: dict[str, Any] = dict(computed)
        members["__getattr__"] = self._attribute(path, cls)
        members["__setattr__"] = self._assignment(path, cls)
        members["state_dict"] = self._state_dict(path, cls)
        members |= {name: self._listed_tensors(path, getattr(cls, name)) for name in _TENSORS_OF}
        members |= {name: self._listed_parts(getattr(cls, name)) for name in _PARTS_OF}
        if (tie := getattr(cls, "tie_weights", None)) is not None:
            members["tie_weights"] = self._on_every_rank(tie)
        members["to"] = fixed_device_to(cls.to, self.device)
        if "device" not in vars(module) and (hasattr(cls, "device") or not path):
            members["device"] = property(lambda _: self.device)
        if not path:
            members["shardit_boundary"] = property(lambda _: self)
        for name, value in list(vars(module).items()):
            if _replaces_method(cls, name, value):
                vars(module)[name] = self._replaced(module, path, name, value)
        subclass_in_place(module, members, late=computed)
        if hasattr(cls, "__iter__") or hasattr(cls, "__getitem__"):
            for name, child in module.named_children():
                self.install(child, f"{path}.{name}" if path else name)

    def install_on(self, values: Iterable[Any]) -> None:
        """Install the interceptor on each value that is a part of the component."""
        paths = {id(part): path for path, part in self._plain[0][0].named_modules()}
        for value in values:
            if isinstance(value, nn.Module) and id(value) in paths:
                self.install(value, paths[id(value)])

    @contextmanager
    def original_classes(self) -> Iterator[None]:
        """Restore the original classes of all modules while a method of the component runs. Raises UnsupportedError if
        a module has got another class since (by a parametrization, say), which that would undo."""
        patched = [type(module) for module, _ in self._plain]
        for (path, _), cls in zip(self.reached, patched, strict=True):
            if SWAPPED not in vars(cls):
                name = f"{type(self._plain[0][0]).__name__}{'.' if path else ''}{path}"
                raise UnsupportedError(
                    f"{name} has got another class ({cls.__name__}) since it was sharded over ranks: change it before"
                )
        for module, cls in self._plain:
            module.__class__ = cls
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            for (module, _), cls in zip(self._plain, patched, strict=True):
                module.__class__ = cls

    def _call(
        self, module: nn.Module, path: str, name: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pass a call from outside to `run`. Methods that only change or describe the component run here, on every
        rank. So do methods that call outside code; calls of smaller parts then go to `run`."""
        computes = name in ALWAYS or has_data(args, kwargs)
        if self.inside or not computes or (not self.on_all and _calls_outside_code(module, name, args, kwargs)):
            with DrawsWithoutData(self.device) if name.startswith(CHANGE) else nullcontext():
                return function(*args, **kwargs)
        refuse_gradients(self._plain[0][0], tree_leaves((args, kwargs)))
        with self.turn() as caller:
            for tensor in list(_pending((args, kwargs))):
                materialize(tensor)
            if caller is not None:
                _compare(caller, module, name, function, args, kwargs)
            with self.original_classes(), self.own_code():
                out = self.run(path, name, function, args, kwargs)
            if caller is not None and caller.by_user:
                for tensor in list(_pending((out, args, kwargs))):
                    materialize(tensor)
        return out

    def _method(self, path: str, name: str, plain: Function, cls: type) -> Function:
        called = ".".join(filter(None, (type(self._plain[0][0]).__name__, path, "" if name == "__call__" else name)))

        @functools.wraps(plain)
        def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.inside:
                refuse_compiling(called, torch.compiler.is_compiling())
            now = getattr(cls, name)  # a user may have replaced it in the class
            return self._call(module, path, name, MethodType(now, module), args, kwargs)

        return method

    def _replaced(self, module: nn.Module, path: str, name: str, function: Function) -> Function:
        """Return the interceptor of a method that was replaced on the instance (compiled, patched) and so hides that of
        the class."""

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._call(module, path, name, function, args, kwargs)

        return functools.update_wrapper(method, function)

    def _state_dict(self, path: str, cls: Any) -> Function:
        plain = cls.state_dict

        @functools.wraps(plain)
        def state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = plain(module, *args, **kwargs)
            if self.inside or args or kwargs:
                return found
            for name, value in found.items():
                if isinstance(value, torch.Tensor):
                    found[name] = self.read(f"{path}.{name}" if path else name, value)
            return found

        return state_dict

    def _listed_tensors(self, path: str, plain: Function) -> Function:
        """Return a method that lists tensors, for users as they would be read one by one."""

        @functools.wraps(plain)
        def listed(module: nn.Module, prefix: str = "", *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
            found = plain(module, prefix, *args, **kwargs)
            if self.inside or self.libraries is None or not listed_by_user(self.libraries):
                return found
            start = len(prefix) + bool(prefix)
            return ((name, self._read(path, name[start:], value)) for name, value in found)

        return listed

    def _read(self, path: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a listed tensor as it would be read. Ranks that hold slices of it cannot read it: any use of its data
        raises."""
        try:
            return self.read(f"{path}.{name}" if path else name, tensor)
        except UnsupportedError as error:
            return _unreadable(tensor, error)

    def _listed_parts(self, plain: Function) -> Function:
        """Return a method that lists parts, which get interceptors if a user asks for them."""

        @functools.wraps(plain)
        def listed(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
            found = plain(module, *args, **kwargs)
            if self.inside or self.libraries is None or not listed_by_user(self.libraries):
                return found
            listed_ones = list(found)
            self.install_on(part for _, part in listed_ones)
            return iter(listed_ones)

        return listed

    def _assignment(self, path: str, cls: Any) -> Function:
        plain = cls.__setattr__

        def __setattr__(module: nn.Module, name: str, value: Any) -> None:
            if not self.inside and is_read_parameter(value):
                place = f"{type(self._plain[0][0]).__name__}.{path}.{name}" if path else name
                raise UnsupportedError(
                    f"{place} cannot become another parameter of a component that one rank owns: share them before "
                    "parallelize"
                )
            plain(module, name, value)

        return __setattr__

    def _on_every_rank(self, plain: Function) -> Function:
        """Return a method that changes the component in the same way on every rank, without interceptors."""

        @functools.wraps(plain)
        def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self.original_classes():
                return plain(module, *args, **kwargs)

        return method

    def _attribute(self, path: str, cls: Any) -> Function:
        plain = cls.__getattr__

        def __getattr__(module: nn.Module, name: str) -> Any:
            if not self.inside and name != COMPILED:  # a wrapper of torch.compile forwards to its module
                inner = vars(module).get("_modules", {}).get(COMPILED)
                if inner is not None:
                    return getattr(getattr(module, COMPILED), name)
            value = plain(module, name)
            place = f"{path}.{name}" if path else name
            if self.inside:
                return value
            if isinstance(value, nn.Module):
                self.install(value, place)
            elif isinstance(value, torch.Tensor):
                return self.read(place, value)
            return value

        return __getattr__


def computing(cls: type) -> dict[str, Function]:
    """Return the methods of a module class that may compute from its weights.

    Methods of mixins and of base classes without a forward are left out: they change or describe a module. If they do
    compute (a user's own mixin), they run on every rank, and the calls and reads that they make are intercepted.
    """
    own = next(base for base in cls.__mro__ if not vars(base).get(SWAPPED))
    found: dict[str, Function] = {}
    for home in reversed(cls.__mro__):
        computes = issubclass(home, nn.Module) and (home.forward is not nn.Module.forward or home is own)
        for name, value in vars(home).items():
            found.pop(name, None)
            chosen = name in ALWAYS or (computes and not vars(home).get(SWAPPED) and name not in _FRAMEWORK)
            if chosen and isinstance(value, FunctionType) and not inspect.isgeneratorfunction(value):
                found[name] = value
    return found


_FRAMEWORK = frozenset(vars(nn.Module))


def _calls_outside_code(module: nn.Module, name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a call runs code from outside: hooks, or modules among its arguments. Hooks of the part itself run
    around its forward, which also has an interceptor."""
    if name == "__call__" and (module._forward_hooks or module._forward_pre_hooks):
        return True
    return bool(hooks_below(module)) or any(isinstance(leaf, nn.Module) for leaf in tree_leaves((args, kwargs)))


def has_data(args: Any, kwargs: Any) -> bool:
    """Return whether arguments hold data to compute with: tensors, arrays, images, random generators."""
    kinds = (torch.Tensor, numpy.ndarray, *GENERATORS)
    return any(isinstance(v, kinds) or type(v).__module__.startswith("PIL.") for v in tree_leaves((args, kwargs)))


def _unreadable(tensor: torch.Tensor, error: Exception) -> torch.Tensor:
    """Return a tensor that has the properties of another; any use of its data raises the error."""

    def refuse() -> None:
        raise error

    with torch._C.DisableTorchFunctionSubclass():
        out = PendingSource(refuse).wrap(tensor.detach().as_subclass(torch.Tensor))
    out._is_param = isinstance(tensor, nn.Parameter)  # pyright: ignore[reportAttributeAccessIssue]
    return out


def _compare(
    caller: Caller, module: nn.Module, name: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compare the arguments of a call from outside between the ranks."""
    kind = type(module)
    if name == "__call__":
        caller.compare(kind.__name__, named(kind.forward, args, kwargs))
    else:
        caller.compare(f"{kind.__name__}.{name}", named(getattr(function, "__func__", None), args, kwargs))


def _replaces_method(cls: type, name: str, value: Any) -> bool:
    """Return whether an attribute of an instance replaces a computing method of its class."""
    if not callable(value) or isinstance(value, (nn.Module, type)):
        return False
    return callable(getattr(cls, name, None)) and (name == "forward" or not hasattr(nn.Module, name))


def _pending(value: Any, depth: int = DEPTH) -> Iterator[PendingTensor]:
    """Yield the pending tensors in nested containers, and in the objects of other types (caches, outputs) in them."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, PendingTensor):
            yield leaf
        elif depth and not isinstance(leaf, (torch.Tensor, nn.Module, type, FunctionType)):
            yield from _pending(list(getattr(leaf, "__dict__", {}).values()), depth - 1)
