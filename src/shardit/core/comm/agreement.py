"""Compares the state that ranks must share: the arguments of a call, the generators, the first latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from shardit.core.comm.barrier import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.digests import SUMMED, digests, short_hash, state_bytes
from shardit.core.runtime.randomness import States, moved, states
from shardit.errors import InputError, UnsupportedError

log = logging.getLogger(__name__)

SEEDS = (
    "seed alike on every rank: generator=torch.Generator().manual_seed(n), or torch.manual_seed(n) without a generator"
)

DRAWS = (
    "draws random numbers on some ranks only (in a hook, a processor or a module in training mode), so the result is "
    "not that of one rank: draw outside of models, or use pipeline_parallel_size=1 and cfg_parallel_size=1"
)

STATE = ("changes of ", "hooks of ", "adapters of ", "configuration of ", "number format of ")
"""First part of the names of compared values other than arguments: the state of the models."""

KINDS = {
    "torch": "torch's global generator (torch.manual_seed)",
    "device": "torch's global generator of the device (torch.manual_seed)",
    "python": "Python's global generator (random.seed)",
    "numpy": "numpy's global generator (numpy.random.seed)",
}
"""The global generators, each with the call that seeds it."""

_UNUSED = b"\0" * 8
"""Sent for a generator that a rank has not used."""

_DRAWING, _FAILED = short_hash(b"drawing"), short_hash(b"failed")
"""Sent by a rank that drew alone, and by one on which a model failed."""


class Caller(NamedTuple):
    """Caller of a collective call. by_user: a user's own program, not a pipeline. compare: compares
    arguments of the ranks to the function of that name: at once if by_user, else at the end of the pipeline's call."""

    by_user: bool
    compare: Callable[[str, Mapping[str, Any]], None]


@dataclass
class Agreement:
    """Compares the calls of one program on one rank with those of the other ranks of its replica.

    depth: number of nested pipeline calls. marked: whether the first latents of the outermost one have been compared.
    differ: the global generators that are not the same on all ranks. drawing: names of models that drew random numbers
    on this rank only. failure: the first error of a model on this rank only.
    _given: the functions of components in the outermost pipeline's call, with checksums of their arguments.
    _last: the arguments of the last call of a model in the outermost pipeline's call.
    """

    ranks: Comm
    depth: int = 0
    marked: bool = False
    differ: tuple[str, ...] = ()
    drawing: set[str] = field(default_factory=set)
    failure: Exception | None = None
    _given: list[tuple[str, str]] = field(default_factory=list)
    _last: Callable[[], Mapping[str, Any]] | None = None

    @contextmanager
    def call(self, name: str, arguments: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Compare a call of a pipeline. Collective; raises InputError on all ranks if they start differently, or if one
        drew from a generator that they do not share."""
        if self.depth or self.ranks.size == 1:
            with self._deeper():
                yield
            return
        device, self.marked, self._last = self.ranks.group.device, False, None
        self.drawing.clear()
        self._given.clear()
        self.failure = None
        before = states(device, [])
        self.differ = self._compare(name, digests({**arguments(), **_modes(device)}), before)
        try:
            with self._deeper():
                yield
        except Exception as error:
            self._last = None  # holds tensors
            if self.failure is not None:  # which this one follows from
                raise self.failure from error
            raise
        self._check_end(name, before, states(device, []))

    def defer(self, name: str, failure: Exception) -> bool:
        """Note an error of a model on this rank only, to be raised on all ranks at the end of the pipeline's call.
        Return whether there is such a call."""
        if not self.depth:
            return False
        if self.failure is None:
            self.failure = failure
            log.error("%s: %s: %s; all ranks raise this at the end of the call", name, type(failure).__name__, failure)
        return True

    def mark(self, name: str, arguments: Callable[[], Mapping[str, Any]]) -> None:
        """Compare the first call of a model inside a call of a pipeline: the noise has been drawn. Collective."""
        if not self.depth:
            return
        self._last = arguments
        if self.marked:
            return
        self.marked = True
        when = "in its first step although the pipeline's arguments are the same"
        self._compare(name, digests(arguments(), SUMMED), {}, when)

    def compare(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Compare a call of a model outside a pipeline. Collective; raises InputError on all ranks if values differ."""
        self.differ = ()
        self._compare(name, digests({**arguments, **_modes(self.ranks.group.device)}), {})

    def note(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Note what this rank gives to the function of a component in a pipeline's call; compared at its end."""
        if self.depth and self.ranks.size > 1:
            self._given.append((name, short_hash(*digests(arguments, SUMMED).values()).hex()))

    def caller(self) -> Caller:
        """Return the caller of a component."""
        return Caller(True, self.compare) if not self.depth else Caller(False, self.note)

    def refuse_draws(self) -> None:
        """At the end of a request: raise UnsupportedError if a model drew on this rank alone. The caller compares it
        between ranks."""
        if self.drawing:
            names = ", ".join(sorted(self.drawing))
            self.drawing.clear()  # the next request may not draw
            raise UnsupportedError(f"{names} {DRAWS}")

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _compare(self, name: str, values: dict[str, bytes], generators: States, when: str = "") -> tuple[str, ...]:
        """Compare, and return the kinds of `generators` in which ranks differ. Raises InputError if `values` differ."""
        parts = [short_hash(*(f"{k}={v!r}".encode() for k, v in values.items()))]
        parts += [short_hash(state_bytes(generators[kind])) if kind in generators else b"\0" * 8 for kind in KINDS]
        gathered = self.ranks.group.gather_bytes(b"".join(parts))
        differ = [len({one[i : i + 8] for one in gathered}) > 1 for i in range(0, 8 * len(parts), 8)]
        if differ[0]:
            known = self.ranks.group.gather_objects(values)
            names = dict.fromkeys(key for one in known for key in one)
            wrong = [key for key in names if len({one.get(key) for one in known}) > 1]
            what = (
                f"ranks differ in {', '.join(wrong) or 'the order of arguments'} of {name}{' ' if when else ''}{when}"
            )
            if wrong and all(key.startswith(STATE) for key in wrong):
                raise InputError(f"{what}: make the same changes on every rank, or make them before parallelize")
            also = f"; {KINDS[self.differ[0]]} differs, too" if self.differ else ""
            raise InputError(f"{what}{also}: give every rank the same values, and {SEEDS}")
        return tuple(kind for kind, other in zip(KINDS, differ[1:], strict=True) if other)

    def _last_step(self) -> bytes:
        """Return a checksum of what the last call of a model was given, in which all steps before have left a trace."""
        last, self._last = self._last, None
        if last is None:
            return _UNUSED
        return short_hash(*(f"{key}={value!r}".encode() for key, value in digests(last(), SUMMED).items()))

    def _check_end(self, name: str, before: States, after: States) -> None:
        """At the end of a call: check that no rank failed, that generators that were equal still are, and that the
        others were not used. Collective, one message."""
        drawn = moved(before, after)
        mine = [_FAILED if self.failure is not None else _DRAWING if self.drawing else _UNUSED]
        mine += [short_hash(repr(self._given).encode()), self._last_step()]
        mine += [_bytes_of(kind, drawn, after, kind in self.differ) for kind in KINDS]
        gathered = [
            [one[i : i + 8] for i in range(0, len(one), 8)] for one in self.ranks.group.gather_bytes(b"".join(mine))
        ]
        if any(one[0] == _FAILED for one in gathered):
            found = self.ranks.group.gather_objects(None if self.failure is None else sendable(self.failure))
            raise self.failure or next(error for error in found if error is not None)
        if any(one[0] != _UNUSED for one in gathered):
            raise UnsupportedError(f"{name} called a model that {DRAWS}")
        if len({one[1] for one in gathered}) > 1:
            known = self.ranks.group.gather_objects(self._given)
            differ = next(of_ranks for of_ranks in zip_longest(*known) if len(set(of_ranks)) > 1)
            names = dict.fromkeys(one[0] for one in differ if one is not None)
            raise InputError(
                f"ranks differ in what {name} gave to {' or '.join(names)}: change tokenizers, processors and "
                f"components alike on every rank, and {SEEDS}"
            )
        if len({one[2] for one in gathered}) > 1:
            raise InputError(
                f"ranks differ in the last step of {name}, though not in the first: a scheduler, a callback or other "
                "code between the steps computes something else on each rank (from a generator of its own?): make it "
                f"the same, and {SEEDS}"
            )
        for number, kind in enumerate(KINDS, start=3):
            values = {one[number] for one in gathered}
            if kind in self.differ and values != {_UNUSED}:
                raise InputError(f"{name} drew from {KINDS[kind]}, which ranks have in different states: {SEEDS}")
            if kind not in self.differ and len(values) > 1:
                raise UnsupportedError(f"{name} used {KINDS[kind]} in code that {DRAWS}")


def _modes(device: torch.device) -> dict[str, Any]:
    """Return the modes of torch that change what calls compute, by the names of their contexts."""
    kinds = [kind for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
    return {
        "torch.autocast": [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds)],
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.set_default_dtype": torch.get_default_dtype(),
    }


def _bytes_of(kind: str, drawn: States, after: States, differs: bool) -> bytes:
    """Return the bytes to send for a generator at the end of a call: a checksum of its state; if states differed
    before, whether it was used."""
    if kind not in drawn:
        return _UNUSED
    return short_hash(kind.encode() if differs else state_bytes(after[kind]))


def checksum(generators: States) -> str:
    """Return a checksum of the states of generators."""
    return short_hash(*(kind.encode() + state_bytes(state) for kind, state in generators.items())).hex()
