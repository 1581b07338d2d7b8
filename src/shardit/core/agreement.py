"""Comparison of the state that ranks must share: the arguments of a call, the generators, the first latents."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from shardit.core.comm import Comm
from shardit.core.pending import settle
from shardit.core.randomness import GENERATORS, States, moved, state_in, states
from shardit.errors import InputError, UnsupportedError

SAMPLES = 4096
"""Of what is larger, as many words go into the checksum by their place; all others by their sum alone."""

SUMMED = 2**20
"""Bytes of a tensor that a pipeline has computed itself. Of larger ones the samples alone count: such a tensor, as
the embeddings of a prompt, differs nearly everywhere if at all, and reading it all takes longer than the messages."""

PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.Size, range, slice, enum.Enum, Path)

SEEDS = (
    "seed alike on every rank: generator=torch.Generator().manual_seed(n), or torch.manual_seed(n) where none is given"
)

DRAWS = (
    "draws random numbers on some ranks only (in a hook, a processor or a module in training mode), so the result is "
    "not that of one rank: draw outside of models, or use pipeline_parallel_size=1 and cfg_parallel_size=1"
)

KINDS = {
    "torch": "torch's global generator (torch.manual_seed)",
    "device": "torch's global generator of the device (torch.manual_seed)",
    "python": "Python's global generator (random.seed)",
    "numpy": "numpy's global generator (numpy.random.seed)",
}
"""The global generators, each with what seeds it."""

_UNUSED = b"\0" * 8
"""What ranks tell of a generator that they have not used."""


@dataclass
class Agreement:
    """The calls of one program on one rank, compared with those of the other ranks of its replica.

    depth: calls of pipelines that run, one inside the other. marked: whether the first latents of the outermost one
    have been compared. differ: the global generators that are not the same on all ranks. drawing: names of models that
    drew random numbers which other ranks did not.
    """

    ranks: Comm
    depth: int = 0
    marked: bool = False
    differ: tuple[str, ...] = ()
    drawing: set[str] = field(default_factory=set)

    @contextmanager
    def call(self, name: str, arguments: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Compare a call of a pipeline. Collective; raises InputError on all ranks where they do not start alike, or
        where one drew from a generator that they do not share."""
        if self.depth or self.ranks.size == 1:
            with self._deeper():
                yield
            return
        device, self.marked = self.ranks.mesh.device, False
        self.drawing.clear()
        before = states(device, [])
        self.differ = self._compare(name, digests(arguments()), before)
        with self._deeper():
            yield
        self._check_draws(name, before, states(device, []))

    def mark(self, name: str, arguments: Callable[[], Mapping[str, Any]]) -> None:
        """Compare the first call of a model inside a call of a pipeline: the noise has been drawn. Collective."""
        if not self.depth or self.marked:
            return
        self.marked = True
        when = "in its first step although the pipeline's arguments are the same"
        self._compare(name, digests(arguments(), SUMMED), {}, when)

    def compare(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Compare a call of a model by itself. Collective; raises InputError on all ranks where values differ."""
        self._compare(name, digests(arguments), {})

    def refuse_draws(self) -> None:
        """At the end of a request: raise UnsupportedError where a model drew on this rank alone. Others compare it."""
        if self.drawing:
            names = ", ".join(sorted(self.drawing))
            self.drawing.clear()  # the next request may do without
            raise UnsupportedError(f"{names} {DRAWS}")

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _compare(self, name: str, values: dict[str, bytes], generators: States, when: str = "") -> tuple[str, ...]:
        """Compare, and return the kinds of `generators` in which ranks differ. Raises InputError where `values` do."""
        parts = [_hash(*(f"{k}={v!r}".encode() for k, v in values.items()))]
        parts += [_hash(_bytes(generators[kind])) if kind in generators else b"\0" * 8 for kind in KINDS]
        told = self.ranks.gather_bytes(b"".join(parts))
        differ = [len({one[i : i + 8] for one in told}) > 1 for i in range(0, 8 * len(parts), 8)]
        if differ[0]:
            known = self.ranks.gather_objects(values)
            names = dict.fromkeys(key for one in known for key in one)
            wrong = [key for key in names if len({one.get(key) for one in known}) > 1]
            also = f"; {KINDS[self.differ[0]]} differs, too" if self.differ else ""
            raise InputError(
                f"ranks differ in {', '.join(wrong) or 'the order of arguments'} of {name}{' ' if when else ''}{when}"
                f"{also}: give every rank the same values, and {SEEDS}"
            )
        return tuple(kind for kind, other in zip(KINDS, differ[1:], strict=True) if other)

    def _check_draws(self, name: str, before: States, after: States) -> None:
        """At the end of a call: generators that were alike must be so still, the others must not have been used.
        Collective, one message."""
        drawn = moved(before, after)
        mine = [_hash(b"drawing") if self.drawing else _UNUSED]
        mine += [_bytes_of(kind, drawn, after, kind in self.differ) for kind in KINDS]
        told = [[one[i : i + 8] for i in range(0, len(one), 8)] for one in self.ranks.gather_bytes(b"".join(mine))]
        if any(one[0] != _UNUSED for one in told):
            raise UnsupportedError(f"{name} called a model that {DRAWS}")
        for number, kind in enumerate(KINDS, start=1):
            values = {one[number] for one in told}
            if kind in self.differ and values != {_UNUSED}:
                raise InputError(f"{name} drew from {KINDS[kind]}, which ranks have in different states: {SEEDS}")
            if kind not in self.differ and len(values) > 1:
                raise UnsupportedError(f"{name} used {KINDS[kind]} in code that {DRAWS}")


def _bytes_of(kind: str, drawn: States, after: States, differs: bool) -> bytes:
    """What ranks tell of a generator at the end: whether it was used, where its states differ anyway, or its state."""
    if kind not in drawn:
        return _UNUSED
    return _hash(kind.encode() if differs else _bytes(after[kind]))


def told(generators: States) -> str:
    """A checksum of the states of generators."""
    return _hash(*(kind.encode() + _bytes(state) for kind, state in generators.items())).hex()


def named(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a method by name (without `self`); by number where the method does not take them."""
    try:
        signature = _signature(function)
        found = dict(signature.bind_partial(None, *args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{str(number): value for number, value in enumerate(args)}, **kwargs}
    found.pop(next(iter(signature.parameters)), None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


@functools.lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def digests(arguments: Mapping[str, Any], summed: int | None = None) -> dict[str, bytes]:
    """A checksum of each argument, in order of names. Tensors that are pending are waited for.

    Strings, numbers, tensors, arrays, pictures and generators count by value, in containers, too; other objects (and
    functions, which ranks may have each of their own) by their kind alone. Of tensors with more than `summed` bytes
    (None: no limit) only samples count.
    """
    settle(list(arguments.values()))
    return {name: _hash(*_described(arguments[name], summed)) for name in sorted(arguments)}


def _described(value: Any, summed: int | None) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield repr((tuple(value.shape), value.dtype)).encode()
        yield checksum(value, summed)
    elif isinstance(value, numpy.ndarray):
        yield repr((value.shape, value.dtype.str)).encode()
        yield repr(value.tolist()).encode() if value.dtype.hasobject else checksum(_of_array(value))
    elif isinstance(value, torch.Generator):
        yield value.device.type.encode()
        yield _bytes(value.get_state())
    elif isinstance(value, GENERATORS):
        yield _bytes(state_in(value))
    elif isinstance(value, (*PLAIN, numpy.generic)):
        yield repr(value).encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _described(item, summed)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _described(item, summed)
    elif isinstance(value, (set, frozenset)):
        yield repr(sorted(map(repr, value))).encode()
    elif hasattr(value, "__array_interface__"):  # a picture
        yield from _described(numpy.asarray(value), summed)
    elif callable(value):
        yield b"function"
    else:
        yield type(value).__qualname__.encode()


def _of_array(array: numpy.ndarray) -> torch.Tensor:
    return torch.from_numpy(numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).copy())


def checksum(tensor: torch.Tensor, summed: int | None = None) -> bytes:
    """A checksum of the values of a tensor, wherever it is. It costs about what it takes to read them once, or, with
    more than `summed` bytes, to read SAMPLES words."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return b""
    with torch.no_grad():
        tensor = tensor.detach().resolve_conj().resolve_neg()
        raw = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        tail = raw.numel() % 8
        words = raw[: raw.numel() - tail]
        if words.data_ptr() % 8 or words.storage_offset() % 8:
            words = words.clone()
        words = words.view(torch.int64)
        sampled = words[:: max(1, -(-words.numel() // SAMPLES))]
        whole = summed is None or words.nbytes <= summed
        total = (words if whole else sampled).sum().reshape(1)  # wraps around
        known = torch.cat([total.view(torch.uint8), sampled.contiguous().view(torch.uint8), raw[raw.numel() - tail :]])
    return zlib.crc32(known.cpu().numpy().tobytes()).to_bytes(4, "little") + bytes(known[:8].tolist())


def _bytes(state: Any) -> bytes:
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else pickle.dumps(state)


def _hash(*parts: bytes) -> bytes:
    made = hashlib.blake2b(digest_size=8)
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.digest()
