"""One call in flight: the unmodified forward as a coroutine that runs its own blocks and waits for the rest."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from shardit.core.comm.p2p import Transfer
from shardit.core.comm.wire import first_byte, storage_bytes
from shardit.core.modules.blocks import CutModel
from shardit.core.plans.call_plan import Address, Hop, Item, Leaf, Site
from shardit.core.plans.local_plan import LocalPlan
from shardit.core.plans.stand_ins import blank, is_float, same_memory, stand_ins
from shardit.core.runtime.coroutine import Coroutine
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.randomness import any_moved, torch_states
from shardit.core.runtime.versions import check_unchanged, inputs_of
from shardit.core.stages.result import Result
from shardit.core.stages.runtime import Runtime
from shardit.errors import RankError


class _Leave(BaseException):
    """Leaves a forward early, when this rank has run its last block. Not an Exception: models may catch those."""


class StagedCall:
    """A forward in flight (a `schedule.Flight`), and the interceptor of its block calls while it runs.

    poison: of a self-check, which every guidance replica makes on its own, with NaN in what has not arrived.
    """

    def __init__(
        self,
        local: LocalPlan,
        cut: CutModel,
        runtime: Runtime,
        forward: Callable[..., Any],
        call: FlatCall,
        poison: bool = False,
    ):
        self.local, self.plan, self.comm = local, local.plan, runtime.comm
        self.owners = self.plan.owners
        self._route = runtime.route.of_one(runtime.guidance.index) if poison else runtime.route
        self.finished = False
        self.failure: BaseException | None = None  # of a self-check
        self._sent: set[int] = set()
        self._cut, self._block_calls, self._runtime, self._forward, self._call = cut, cut.calls, runtime, forward, call
        self._generators: list[torch.Tensor] = []
        self._poison = poison
        self._site = 0
        self._handles: dict[Address, torch.Tensor] = {}
        self._messages: dict[int, torch.Tensor] = {}
        self._copies: dict[tuple[int, int], torch.Tensor] = {}  # (hop, item) -> what is sent, though written to since
        self._receives: dict[int, Transfer] = {}
        self._sends: list[Transfer] = []
        self._inputs = inputs_of(call.leaves)
        self._device = self.comm.mesh.device
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
        (self._runtime.turns if self._poison else self._runtime).wait_for(self)
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
        receive = self._receives.pop(segment - 1, None)
        if receive is not None:
            self._take(receive)
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
            self._result_receive = self._route.receive(self._runtime.guidance.index, last, self._result.memory)

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
        self._block_calls.interceptor = self
        self._generators = torch_states(self._device)
        try:
            self._coroutine.resume()
            if any_moved(self._generators, torch_states(self._device)):
                self._runtime.agreement.drawing.add(self._cut.name)
        except RankError:
            raise
        except Exception as error:
            if self._site == 0:
                raise  # in the prologue, which every rank runs: the caller's error
            raise RankError(self.comm.mesh.rank, traceback.format_exc()) from error
        finally:
            self._block_calls.interceptor = None

    def _run(self) -> None:
        try:
            with torch.no_grad():
                out = self._forward(*self._call.args, **self._call.kwargs)
        except _Leave:
            return
        if self._site < len(self.plan.sites):
            raise RuntimeError(f"the forward ends after {self._site} of {len(self.plan.sites)} block calls")
        leaves, _ = tree_flatten(out)
        for number, view in self._result.views():
            self._check(self.plan.result.leaves[number], leaves[number], "the result")
            view.copy_(leaves[number])

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block if it is ours, else hand back placeholders; send and wait at the ends of segments."""
        n = self._site
        self._site = n + 1
        if n == 0 and self.comm.mesh.sizes["cfg"] == 1:  # before that all ranks draw alike
            self._generators = torch_states(self._device)
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
        if n in self.local.stops:
            self._stop(n)
        return out

    def _own(self, n: int, site: Site, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._block_calls.interceptor = None  # a block's own inner modules are no call sites
        given = tree_leaves((args, kwargs)) if any(leaf.kind == "arg" for leaf in site.leaves) else ()
        out = call(*args, **kwargs)
        self._block_calls.interceptor = self
        self._cut.ran[index] += 1
        if n in self.local.checked:
            leaves, _ = tree_flatten(out)
            if len(leaves) != len(site.leaves):
                raise RuntimeError(f"block call {n} returns {len(leaves)} values, not {len(site.leaves)}")
            for expected, got in zip(site.leaves, leaves, strict=True):
                self._check(expected, got, f"block call {n}")
            if not same_memory(site, leaves, given):
                raise RuntimeError(f"block call {n} returns tensors that share memory in another way than in the first")
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
        leaves = stand_ins(site, arguments, lambda leaf: self._placeholder_memory(n, leaf))
        for number in self.local.keep_outs.get(n, ()):
            self._handles[Address(n, "out", number)] = leaves[number]
        return tree_unflatten(leaves, site.spec)

    def _placeholder_memory(self, n: int, leaf: Leaf) -> tuple[torch.Tensor, int]:
        """Memory for a new storage of an unowned block, and the byte of the storage at which it starts."""
        where = self.local.fresh.get((n, leaf.storage))
        if where is not None:
            k, item, start = where
            offset, size = self.plan.hops[k].layout.parts[item]
            return self._message(k)[offset : offset + size], start
        memory = blank(leaf, self._device)
        return (memory.fill_(0xFF) if self._poison and is_float(leaf) else memory), 0

    def _stop(self, n: int) -> None:
        """At the exit of a call site: send, wait, put in place what came, keep what is sent later."""
        local, ends = self.local, self.local.last_of.get(n)
        if ends is not None and ends < len(self.plan.hops) and self.plan.hops[ends].source == local.rank:
            self._send(self.plan.hops[ends], ends)
            self._sent.add(ends)
        if ends is not None and ends >= local.last_own and ends < len(self.plan.hops):
            raise _Leave
        if n in local.pauses:
            self._coroutine.pause()  # until the schedule runs the segment after that hop
        for k, i in local.places.get(n, ()):
            message, (offset, size) = self._messages.get(k), self.plan.hops[k].layout.parts[i]
            if message is not None:  # it is not empty
                self._memory(self.plan.hops[k].items[i]).copy_(message[offset : offset + size])
        for k, i in local.copies.get(n, ()):
            self._copies[k, i] = self._memory(self.plan.hops[k].items[i]).clone()
        if ends is not None:
            self._release(ends)

    # Messages.

    def _message(self, k: int) -> torch.Tensor:
        if k not in self._messages:
            size = self.plan.hops[k].layout.total
            message = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._messages[k] = message.fill_(0xFF) if self._poison else message  # all ones is a NaN in every format
            for offset, size in self.local.integers.get(k, ()):
                message[offset : offset + size].zero_()
        return self._messages[k]

    def _send(self, hop: Hop, k: int) -> None:
        if not hop.layout.total:
            return
        kept = [self._copies.pop((k, i), None) for i in range(len(hop.items))]
        sources = [self._memory(item) if copy is None else copy for item, copy in zip(hop.items, kept, strict=True)]
        if len(sources) == 1 and not (hop.items[0].copy and kept[0] is None):
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

    def _release(self, k: int) -> None:
        self._messages.pop(k, None)
        for address in self.local.release.get(k, ()):
            self._handles.pop(address, None)

    def _memory(self, item: Item) -> torch.Tensor:
        handle = self._handles[item.address]
        return storage_bytes(handle, first_byte(handle) + item.start, item.size)
