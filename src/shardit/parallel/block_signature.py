"""Decides whether two block calls are of one kind: identical blocks, arguments of the same structure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from shardit.core.modules.fingerprint import FORWARD, PROCESSOR
from shardit.core.modules.hooks import from_outside
from shardit.core.modules.snapshot import is_object

PACKAGE = str(Path(__file__).parents[1])
"""Folder of this package."""


def fingerprint(block: nn.Module, ignored: Callable[[type], Container[str]] = lambda cls: ()) -> str:
    """Return a digest of everything that distinguishes blocks: classes, parameters, and plain attributes of all
    submodules except those that are `ignored` for their class; objects by identity.

    Blocks with the same digest run the same code in the same configuration on data of the same shapes. Two blocks have
    the same digest on every rank or on none, even if a block's data is not there.
    """
    seen: list[Any] = [(name, tuple(p.shape), str(p.dtype)) for name, p in block.named_parameters()]
    for name, module in block.named_modules():
        seen.append((name, *_described(module, ignored), *_put_on(module)))
        processor = getattr(module, PROCESSOR, None)
        if processor is not None:
            seen.append((name, *_described(processor, ignored)))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _described(thing: Any, ignored: Callable[[type], Container[str]]) -> tuple[Any, ...]:
    cls, without = type(thing), ignored(type(thing))
    plain = {k: v for k, v in vars(thing).items() if k not in without and _is_plain(v)}
    others = {k: id(v) for k, v in vars(thing).items() if k not in plain and (is_object(v) or _is_function(v))}
    if _is_function(thing):
        others[""] = id(thing)
    return cls.__module__, cls.__qualname__, sorted(plain.items(), key=itemgetter(0)), sorted(others.items())


def _put_on(module: nn.Module) -> Iterator[int]:
    """Return the forwards of a module and of its class, and hooks of users, by identity: a block with others than
    another block is of another kind."""
    forwards = vars(module).get(FORWARD), type(module).forward
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return (id(_innermost(code)) for code in (*forwards, *filter(from_outside, hooks)))


def _innermost(code: Any) -> Any:
    """Return the function inside a wrapper of this package; other functions are returned as they are."""
    while getattr(getattr(code, "__code__", None), "co_filename", "").startswith(PACKAGE) and code is not None:
        code = getattr(code, "__wrapped__", None)
    return code


def _is_function(value: Any) -> bool:
    return isinstance(value, (FunctionType, partial))


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype))


def value_key(leaf: Any) -> Any:
    """Return the part of an argument leaf that belongs to the kind of a call: dtype and dimensions of tensors, values
    that control code; for anything else (floats change from step to step) the type."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.ndim)
    if isinstance(leaf, (bool, int, str, bytes, type(None), torch.dtype, torch.device)):
        return (type(leaf).__name__, leaf)
    return type(leaf).__name__
