"""Parameters whose data another rank has: on meta, but user code that asks for their device gets that of this rank."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.runtime.pending import METADATA
from shardit.errors import UnsupportedError

_T: Any = torch.Tensor
LOAD = nn.Module._load_from_state_dict.__code__
ON_WHOLE_MODULES = {nn.Module._apply.__code__, LOAD}
"""Functions of torch that change all parameters of a module, on every rank alike (`half()`, `load_state_dict`)."""

_device, _is_meta = _T.device.__get__, _T.is_meta.__get__
FLAGS = {
    _T.requires_grad.__set__,
    _T.grad.__get__,
    _T.grad.__set__,
    _T.requires_grad_,
    _T._version.__get__,
    _T.__repr__,
}
"""Further uses of a parameter that read no data."""


@dataclass(frozen=True)
class Libraries:
    """Prefixes of Python modules. placing: of libraries that place tensors next to parameters, and so see meta. own: of
    those whose code handles parameters of which a rank has no data."""

    placing: tuple[str, ...]
    own: tuple[str, ...]


class AbsentParameter(nn.Parameter):
    """A parameter on meta. `x.to(next(model.parameters()).device)` in user code, run on all ranks alike, then keeps the
    data of x on every rank. User code that reads its data gets an error."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The device of this rank; meta for libraries that place tensors."""
        caller = f"{sys._getframe(1).f_globals.get('__name__', '')}."
        here, libraries = vars(self).get("shardit_here", (None, None))
        return _device(self) if here is None or caller.startswith(libraries.placing) else here

    @property
    def is_meta(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True, except for `load_state_dict`, which would warn of copies that do nothing."""
        return sys._getframe(1).f_code is not LOAD and _is_meta(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in METADATA and func not in FLAGS:
            values = (*args, *(kwargs or {}).values())
            absent = next((value for value in values if isinstance(value, AbsentParameter)), None)
            _, libraries = vars(absent).get("shardit_here", (None, None)) if absent is not None else (None, None)
            if libraries is not None and called_by_user(libraries.own):
                raise UnsupportedError(
                    "a parameter that is on another rank is read: each rank holds only its own part; read it before "
                    "parallelize"
                )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def called_by_user(libraries: tuple[str, ...]) -> bool:
    """Return whether no code of these libraries is running above the one that calls the caller, and none that changes a
    whole module."""
    frame = sys._getframe(2)
    while frame is not None:
        if f"{frame.f_globals.get('__name__', '')}.".startswith(libraries) or frame.f_code in ON_WHOLE_MODULES:
            return False
        frame = frame.f_back
    return True


_LISTING = frozenset(
    getattr(nn.Module, name).__code__
    for name in ("parameters", "buffers", "modules", "children", "named_modules", "named_children", "apply")
)


def listed_by_user(libraries: tuple[str, ...]) -> bool:
    """Return whether code of users lists the parts or tensors of a module, also in a function of torch that they give
    the list to; not code of these libraries, or of torch (`requires_grad_`) that lists them itself."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code in _LISTING:
        frame = frame.f_back
    home = "" if frame is None else f"{frame.f_globals.get('__name__', '')}."
    return not home.startswith(libraries) and (home.startswith("torch.nn.utils.") or not home.startswith("torch."))


def mark_absent(module: nn.Module, device: torch.device, libraries: Libraries) -> None:
    """Make the parameters of a module that are on meta AbsentParameters, in place."""
    for parameter in module.parameters():
        if parameter.is_meta and type(parameter) is nn.Parameter:
            parameter.__class__ = AbsentParameter
            vars(parameter)["shardit_here"] = device, libraries


def partial_state_dict(plain: Callable[..., Any], libraries: Libraries) -> Callable[..., Any]:
    """Return a `state_dict` for a module of which each rank has a part: without arguments it refuses user code, which
    would save it."""

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (args or kwargs) and called_by_user(libraries.own):
            advice = "take it before parallelize, or use state_dict(keep_vars=True) for the part of this rank"
            raise UnsupportedError(f"{type(self).__name__}.state_dict(): each rank holds only its own part; {advice}")
        return plain(self, *args, **kwargs)

    return state_dict


def refuse_partial_states(model: nn.Module, names: Collection[str], libraries: Libraries) -> None:
    """Refuse `state_dict()` of modules within a model that contain, or are in, one of the named modules and parameters,
    of which each rank may have another part: to users, and to libraries that make another model from it. On all ranks
    alike, whichever part they have."""

    def refuse(part: nn.Module, prefix: str, keep_vars: bool) -> None:
        caller = f"{sys._getframe(2).f_globals.get('__name__', '')}."
        if not (prefix or keep_vars or caller.startswith(libraries.placing)):
            raise UnsupportedError(
                f"state_dict() of a {type(part).__name__} in a {type(model).__name__}: each rank holds only its own "
                "part; take it, or make another model from it, before parallelize"
            )

    split, above = set(names), {path for name in names for path in _paths_to(name)}
    for path, part in model.named_modules():
        if path and (path in above or not split.isdisjoint(_paths_to(path))):
            part.register_state_dict_pre_hook(refuse)


def _paths_to(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module or parameter, and its own."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
