"""One call in flight: the unmodified forward as a coroutine that runs its own blocks and waits for the rest."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import RankError
from .comm import Comm, Transfer, first_byte, storage_bytes, view_bytes, view_near
from .coroutine import Coroutine
from .plan import Address, CallPlan, Hop, Item, Leaf, Site
from .result import Result, Route
from .writes import check_unchanged, inputs_of


class _Leave(BaseException):
    """Leaves a forward early, when this rank has run its last block. Not an Exception: models may catch those."""


@dataclass
class LocalPlan:
    """What one rank has to do for a `CallPlan`, looked up by call site.

    keep_args, keep_outs: leaves whose tensors are remembered, for a hop. fresh: output storages of unowned sites that
    lie in the message of a hop. last_of: segment that ends at a site. release: what no hop after this one needs.
    integers: (offset, size) of the parts of a hop's message that code may index with before it arrives.
    """

    plan: CallPlan
    rank: int
    keep_args: dict[int, list[int]] = field(default_factory=dict)
    keep_outs: dict[int, list[int]] = field(default_factory=dict)
    fresh: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)
    last_of: dict[int, int] = field(default_factory=dict)
    last_own: int = -1
    release: dict[int, list[Address]] = field(default_factory=dict)
    integers: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    needs_args: set[int] = field(default_factory=set)
    checked: set[int] = field(default_factory=set)

    @staticmethod
    def of(plan: CallPlan, rank: int) -> LocalPlan:
        """Select the part of a plan that concerns `rank`."""
        local = LocalPlan(plan, rank)
        local.last_of = {last: k for k, (_, last) in enumerate(plan.segments)}
        local.last_own = max((k for k, owner in enumerate(plan.owners) if owner == rank), default=-1)
        last_use: dict[Address, int] = {}
        for k, hop in enumerate(plan.hops):
            if rank not in (hop.source, hop.target):
                continue
            last_use.update((item.address, k) for item in hop.items)
            for i, item in enumerate(hop.items):
                where = item.address
                keep = local.keep_args if where.kind == "arg" else local.keep_outs
                keep.setdefault(where.site, []).append(where.leaf)
                if hop.target == rank and item.fresh:
                    leaf = plan.sites[where.site].leaves[where.leaf]
                    if not _is_float(leaf):
                        local.integers.setdefault(k, []).append(hop.layout.parts[i])
                    local.fresh[(where.site, leaf.storage)] = (k, i, item.start + leaf.offset * _width(leaf))
        for address, k in last_use.items():
            local.release.setdefault(k, []).append(address)
        for n, site in enumerate(plan.sites):
            if n in local.keep_args or (site.owner != rank and any(leaf.kind == "arg" for leaf in site.leaves)):
                local.needs_args.add(n)
            if n in local.last_of or n in local.keep_outs or any(leaf.kind == "value" for leaf in site.leaves):
                local.checked.add(n)
        return local


class StagedCall:
    """A forward in flight (a `schedule.Flight`), and the seam of its block calls while it runs."""

    def __init__(
        self,
        local: LocalPlan,
        comm: Comm,
        route: Route,
        current: dict[str, Any],
        forward: Callable[[], Any],
        arguments: Any,
        wait: Callable[[StagedCall], None],
        count: Callable[[int], None],
        poison: bool = False,
    ):
        self.local, self.plan, self.comm, self._route = local, local.plan, comm, route
        self.owners = self.plan.owners
        self._replica = comm.mesh.coords["cfg"]
        self.finished = False
        self.failure: BaseException | None = None  # of a self-check
        self._sent: set[int] = set()
        self._current, self._forward, self._wait, self._count = current, forward, wait, count
        self._poison = poison
        self._site = 0
        self._handles: dict[Address, torch.Tensor] = {}
        self._messages: dict[int, torch.Tensor] = {}
        self._receives: dict[int, Transfer] = {}
        self._sends: list[Transfer] = []
        self._inputs = inputs_of(arguments)
        self._device = comm.mesh.device
        self._result = Result(self.plan.result, self._device, self._settle)
        self._result_receive: Transfer | None = None
        self._coroutine = Coroutine(self._run)

    # What the caller of the model gets.

    def result(self) -> Any:
        """What forward returns, with pending tensors over the memory that the last stage fills."""
        return self._result.tree()

    def settle(self) -> None:
        """Wait for the result."""
        self._result.source.wait()

    def _settle(self) -> None:
        self._wait(self)
        if self._result_receive is not None:
            self._take(self._result_receive)

    # What the schedule asks for.

    def begin(self) -> None:
        """Start the forward: the prologue everywhere, and on the owner of the first block its segment."""
        if self.local.last_own < 0:
            return  # none of this rank's blocks is called
        self._advance(0)

    def run(self, segment: int) -> None:
        """Take what came in for `segment` and go on until this rank has to wait again, or is done."""
        check_unchanged(self._inputs, self.comm.mesh.rank)
        self._unpack(segment - 1)
        self._advance(segment)

    def post(self, segment: int) -> None:
        """Post the receive of the hop after `segment`."""
        hop = self.plan.hops[segment]
        if hop.layout.total:
            self._receives[segment] = self.comm.receive(self._message(segment), hop.source)

    def finish(self) -> None:
        """Send the result to every other rank, or post the receive of it."""
        self._handles.clear()
        if not self.plan.result.layout.total:
            return
        last = self.owners[-1]
        if self.local.rank == last:
            self._route.send(self._result.memory.clone())  # the caller may write to its result while it is being sent
        else:
            self._result_receive = self._route.receive(self._replica, last, self._result.memory)

    # The forward, in its coroutine.

    def _advance(self, segment: int) -> None:
        """Go on. A self-check goes on after a failure too, so that no rank waits for what never comes."""
        if not self._poison:
            self._resume()
            return
        try:
            if self.failure is None:
                self._resume()
        except Exception as error:
            self.failure = error.__cause__ or error
        hop = self.plan.hops[segment] if segment < len(self.plan.hops) else None
        if self.failure and hop and hop.source == self.local.rank and segment not in self._sent and hop.layout.total:
            self.comm.send(torch.zeros(hop.layout.total, dtype=torch.uint8, device=self._device), hop.target)

    def _resume(self) -> None:
        self._current["seam"] = self
        try:
            self._coroutine.resume()
        except RankError:
            raise
        except Exception as error:
            if self._site == 0:
                raise  # in the prologue, which every rank runs: the caller's error
            raise RankError(self.comm.mesh.rank, traceback.format_exc()) from error
        finally:
            self._current["seam"] = None

    def _run(self) -> None:
        try:
            with torch.no_grad():
                out = self._forward()
        except _Leave:
            return
        leaves, _ = tree_flatten(out)
        for number, view in self._result.views():
            self._check(self.plan.result.leaves[number], leaves[number], "the result")
            view.copy_(leaves[number])

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The seam: run the block if it is ours, else hand back placeholders; send and wait at the ends of segments."""
        n = self._site
        self._site = n + 1
        if n >= len(self.plan.sites) or self.plan.sites[n].block != index:
            raise RuntimeError(f"block call {n} is not the one of the first call of this signature")
        site = self.plan.sites[n]
        arguments: list[Any] = []
        if n in self.local.needs_args:
            arguments, _ = tree_flatten((args, kwargs))
            for leaf in self.local.keep_args.get(n, ()):
                self._handles[Address(n, "arg", leaf)] = arguments[leaf]
        if site.owner == self.local.rank:
            out = self._own(n, site, index, call, args, kwargs)
        else:
            out = self._placeholders(n, site, arguments)
        k = self.local.last_of.get(n)
        if k is not None:
            self._end_of_segment(k)
        return out

    def _own(self, n: int, site: Site, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._current["seam"] = None  # a block's own inner modules are no call sites
        out = call(*args, **kwargs)
        self._current["seam"] = self
        self._count(index)
        if n in self.local.checked:
            leaves, _ = tree_flatten(out)
            if len(leaves) != len(site.leaves):
                raise RuntimeError(f"block call {n} returns {len(leaves)} values, not {len(site.leaves)}")
            for expected, got in zip(site.leaves, leaves, strict=True):
                self._check(expected, got, f"block call {n}")
            for leaf in self.local.keep_outs.get(n, ()):
                self._handles[Address(n, "out", leaf)] = leaves[leaf]
        return out

    def _check(self, expected: Leaf, got: Any, what: str) -> None:
        if isinstance(got, torch.Tensor):
            same = expected.kind != "value" and (got.dtype, tuple(got.shape)) == (expected.dtype, expected.size)
            if not same or (
                expected.kind == "tensor" and what != "the result" and tuple(got.stride()) != expected.stride
            ):
                raise RuntimeError(f"{what} gives {tuple(got.shape)} {got.dtype}, not {expected.size} {expected.dtype}")
        elif expected.kind != "value" or got != expected.value:
            raise RuntimeError(
                f"{what} gives {got!r}, which was {expected.value!r} in the first call of this signature"
            )

    def _placeholders(self, n: int, site: Site, arguments: list[Any]) -> Any:
        storages: dict[int, tuple[torch.Tensor, int]] = {}
        leaves: list[Any] = []
        for number, leaf in enumerate(site.leaves):
            if leaf.kind == "value":
                leaves.append(leaf.value)
                continue
            if leaf.kind == "arg":
                base = arguments[leaf.arg]
                assert leaf.dtype is not None
                leaves.append(base if leaf.same else view_near(base, leaf.offset, leaf.dtype, leaf.size, leaf.stride))
            else:
                assert leaf.dtype is not None
                if leaf.storage not in storages:
                    storages[leaf.storage] = self._placeholder_memory(n, leaf)
                memory, start = storages[leaf.storage]
                offset = leaf.offset * leaf.dtype.itemsize - start
                leaves.append(view_bytes(memory, offset, leaf.dtype, leaf.size, leaf.stride))
            if number in self.local.keep_outs.get(n, ()):
                self._handles[Address(n, "out", number)] = leaves[-1]
        return tree_unflatten(leaves, site.spec)

    def _placeholder_memory(self, n: int, leaf: Leaf) -> tuple[torch.Tensor, int]:
        """Memory for a new storage of an unowned block, and the byte of the storage at which it starts."""
        where = self.local.fresh.get((n, leaf.storage))
        if where is not None:
            k, item, start = where
            offset, size = self.plan.hops[k].layout.parts[item]
            return self._message(k)[offset : offset + size], start
        if not _is_float(leaf):
            # Arithmetic on what was never written is harmless; indexing with it is not.
            return torch.zeros(leaf.nbytes, dtype=torch.uint8, device=self._device), 0
        memory = torch.empty(leaf.nbytes, dtype=torch.uint8, device=self._device)
        return (memory.fill_(0xFF) if self._poison else memory), 0

    def _end_of_segment(self, k: int) -> None:
        if k < len(self.plan.hops):
            hop = self.plan.hops[k]
            if hop.source == self.local.rank:
                self._send(hop)
                self._sent.add(k)
                self._release(k)
            if k >= self.local.last_own:
                raise _Leave
            if hop.target == self.local.rank:
                self._coroutine.pause()  # until the schedule runs segment k + 1

    # Messages.

    def _message(self, k: int) -> torch.Tensor:
        if k not in self._messages:
            size = self.plan.hops[k].layout.total
            message = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._messages[k] = message.fill_(0xFF) if self._poison else message  # all ones is a NaN in every format
            for offset, size in self.local.integers.get(k, ()):
                message[offset : offset + size].zero_()
        return self._messages[k]

    def _send(self, hop: Hop) -> None:
        if not hop.layout.total:
            return
        sources = [self._memory(item) for item in hop.items]
        if len(sources) == 1 and not hop.items[0].copy:
            self._sends.append(self.comm.send(sources[0], hop.target))
            return
        message = torch.empty(hop.layout.total, dtype=torch.uint8, device=self._device)
        for source, (offset, size) in zip(sources, hop.layout.parts, strict=True):
            message[offset : offset + size].copy_(source)
        self._sends.append(self.comm.send(message, hop.target))

    def _take(self, receive: Transfer) -> None:
        """Wait for a message. What this rank sent before was taken on its way here, so its memory can go."""
        self.comm.wait(receive)
        for send in self._sends:
            self.comm.wait(send)
        self._sends.clear()

    def _unpack(self, k: int) -> None:
        hop = self.plan.hops[k]
        if k in self._receives:
            self._take(self._receives.pop(k))
        if self.failure is not None:
            return
        message = self._messages.pop(k, None)
        for item, (offset, size) in zip(hop.items, hop.layout.parts, strict=True):
            if not item.fresh and message is not None:
                self._memory(item).copy_(message[offset : offset + size])
        self._release(k)

    def _release(self, k: int) -> None:
        for address in self.local.release.get(k, ()):
            self._handles.pop(address, None)

    def _memory(self, item: Item) -> torch.Tensor:
        handle = self._handles[item.address]
        return storage_bytes(handle, first_byte(handle) + item.start, item.size)


def _width(leaf: Leaf) -> int:
    assert leaf.dtype is not None
    return leaf.dtype.itemsize


def _is_float(leaf: Leaf) -> bool:
    assert leaf.dtype is not None
    return leaf.dtype.is_floating_point or leaf.dtype.is_complex
