"""Tracks dependencies while a VAE call runs on shapes: the source part calls of each tensor, and the outputs that glue
reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardit.core.runtime.storages import Origins, tensors_of, written


class Untileable(Exception):
    """Reason for not distributing the tiles of a VAE call: "its decoder draws random numbers"."""


class TileWatch(TorchDispatchMode):
    """Sees every operation, inside part calls and in the glue between them. Everything is tracked by storage. origins:
    the part calls from which tensors derive."""

    def __init__(self, arguments: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._inside: int | None = None
        self._made: set[int] = set()  # storages of the running call
        self.origins = Origins()
        self._outputs: dict[int, set[tuple[int, int]]] = {}  # storage -> (call, leaf) in it
        self._hidden: set[int] = set()  # storages that a call made and did not return
        self._read: set[tuple[int, int]] = set()
        self._key = self.origins.number
        self._arguments = {self._key(tensor) for tensor in arguments}

    @contextmanager
    def call(self, number: int) -> Iterator[None]:
        """Track part call `number` while it runs."""
        self._inside, self._made = number, set()
        try:
            yield
        finally:
            self._inside = None

    def record_outputs(self, number: int, outputs: list[Any], arguments: list[Any]) -> None:
        """Record the outputs of part call `number`, and containers among its arguments, to which it may have added
        tensors."""
        for leaf, tensor in enumerate(outputs):
            if isinstance(tensor, torch.Tensor):
                key = self._key(tensor)
                if key not in self._made:
                    raise Untileable("a part of it returns one of its arguments")
                self._outputs.setdefault(key, set()).add((number, leaf))
        for key in self._made:
            self.origins.sources[key] = frozenset((number,))
        self._hidden |= self._made - self._outputs.keys()

    def result(self, tensors: Iterable[torch.Tensor]) -> None:
        """Record the result of the VAE call."""
        self._glue(list(tensors), [])

    def read_of(self, number: int) -> tuple[int, ...]:
        """Return the leaves of a part call's output that glue reads."""
        return tuple(sorted(leaf for call, leaf in self._read if call == number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(func, args, kwargs):
            raise Untileable("it draws random numbers")
        out = func(*args, **kwargs)
        read, wrote = tensors_of((args, kwargs)), written(func, args, kwargs)
        if any(self._key(t) in self._arguments for t in wrote):
            raise Untileable("it writes to its arguments")  # and would do so again when it runs again
        if self._inside is None:
            self._glue(read, [*tensors_of(out), *wrote])
            return out
        if any(self._key(t) not in self._made for t in wrote):
            raise Untileable("a part of it writes to its arguments")
        known = {self._key(t) for t in read} - self._made
        self._made.update(key for t in tensors_of(out) if (key := self._key(t)) not in known)
        return out

    def _glue(self, read: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """Check an operation between part calls."""
        for key in map(self._key, read):
            self._read |= self._outputs.get(key, set())
            if key in self._hidden:
                raise Untileable("it reads tensors that a part did not return")
        self.origins.derive(made, read)


def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a random kernel draws nothing: attention kernels draw random numbers only for dropout."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    value = kwargs.get("dropout_p", args[place] if place < len(args) else func._schema.arguments[place].default_value)
    return value == 0.0
