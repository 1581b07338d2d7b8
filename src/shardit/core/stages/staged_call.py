"""One call in flight: the unmodified forward as a coroutine that runs its own blocks and waits for the rest."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from shardit.core.comm.p2p import Transfer
from shardit.core.modules.blocks import CutModel
from shardit.core.plans.local_plan import LocalPlan, SiteWork
from shardit.core.plans.stand_ins import check_kind, same_memory, stand_ins
from shardit.core.runtime.coroutine import Coroutine
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.randomness import any_moved, torch_states
from shardit.core.runtime.versions import check_unchanged, inputs_of
from shardit.core.stages.carried import CarriedTensors
from shardit.core.stages.result import Result
from shardit.core.stages.runtime import Runtime
from shardit.errors import RankError


class _StopForward(BaseException):
    """Leaves a forward early, when this rank has run its last block. Not an Exception: models may catch those."""


class BlockError(RankError):
    """An error of a block in a later call, of which the other ranks do not know."""


class StagedCall:
    """A forward in flight (a `Flight`), and the interceptor of its block calls while it runs.

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
        self.local, self.plan, self.owners = local, local.plan, local.plan.owners
        self.finished = False
        self.failure: BaseException | None = None  # after which nothing is computed, but all messages are sent
        self._cut, self._runtime, self._forward, self._call, self._poison = cut, runtime, forward, call, poison
        self._route = runtime.route.of_one(runtime.guidance.index) if poison else runtime.route
        self._site = 0
        self._inputs = inputs_of(call.leaves)
        self._generators: list[Any] = []
        self._carried = CarriedTensors(local, runtime.comm, poison)
        self._result = Result(self.plan.result, runtime.mesh.device, self._materialize)
        self._result_receive: Transfer | None = None
        self._coroutine = Coroutine(self._run)

    # What the caller of the model gets.

    def result(self) -> Any:
        """Result of forward, with pending tensors over the memory that the last stage fills."""
        return self._result.tree()

    def materialize(self) -> None:
        """Wait for the result."""
        self._result.source.wait()

    def _materialize(self) -> None:
        (self._runtime.loop if self._poison else self._runtime).wait_for(self)
        if self._result_receive is not None:
            self._carried.take(self._result_receive)

    # What the schedule asks for.

    def begin(self) -> None:
        """Start the forward: the prologue everywhere, and on the owner of the first block its segment."""
        if self.local.last_own >= 0:  # else none of this rank's blocks is called
            self._advance(0)

    def run(self, segment: int) -> None:
        """Take what came in for `segment` and go on until this rank has to wait again, or is done."""
        check_unchanged(self._inputs, self._runtime.mesh.rank)
        self._carried.arrive(segment - 1)
        self._advance(segment)

    def post(self, segment: int) -> None:
        """Post the receive of the hop after `segment`."""
        self._carried.post(segment)

    def finish(self) -> None:
        """Send the result to every other rank, or post the receive of it."""
        self._carried.clear()
        if not self.plan.result.layout.total:
            return
        last = self.owners[-1]
        if self.local.rank == last:
            self._route.send(self._result.memory.clone())  # the caller may write to its result while it is being sent
        else:
            self._result_receive = self._route.receive(self._runtime.guidance.index, last, self._result.memory)

    # The forward, in its coroutine.

    def _advance(self, segment: int) -> None:
        """Go on. After a failure of a self-check, or of a block inside a pipeline's call (which raises it at its end,
        on all ranks), the messages are still sent, so that no rank waits for what never comes."""
        try:
            if self.failure is None:
                self._resume()
        except Exception as error:
            if not self._poison and not self._is_deferred(error):
                raise
            self.failure = error.__cause__ or error
        if self.failure is not None and segment < len(self.plan.hops):
            self._carried.send_nothing(segment)

    def _resume(self) -> None:
        device, own = self._runtime.mesh.device, self._cut.generators
        self._cut.calls.interceptor = self
        self._generators = torch_states(device, own)
        try:
            self._coroutine.resume()
            if any_moved(self._generators, torch_states(device, own)):
                self._runtime.agreement.drawing.add(self._cut.name)
        except RankError:
            raise
        except Exception as error:
            if self._site == 0 and self._runtime.mesh.sizes["cfg"] == 1:
                raise  # in the prologue, which every rank runs: the caller's error
            raise BlockError(self._runtime.mesh.rank, traceback.format_exc()) from error
        finally:
            self._cut.calls.interceptor = None

    def _is_deferred(self, error: Exception) -> bool:
        """Return whether the call of the pipeline raises the error of a block at its end. What this rank still sends as
        the result of the model is NaN."""
        if not isinstance(error, BlockError) or not self._runtime.defer(self._cut.name, error.__cause__):
            return False
        for _, view in self._result.views():
            view.fill_(float("nan") if view.dtype.is_floating_point or view.dtype.is_complex else 0)
        return True

    def _run(self) -> None:
        try:
            with torch.no_grad():
                out = self._forward(*self._call.args, **self._call.kwargs)
        except _StopForward:
            return
        if self._site < len(self.plan.sites):
            raise RuntimeError(f"the forward ends after {self._site} of {len(self.plan.sites)} block calls")
        leaves, _ = tree_flatten(out)
        for number, view in self._result.views():
            check_kind(self.plan.result.leaves[number], leaves[number], "the result")
            view.copy_(leaves[number])

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block if it is ours, else hand back placeholders; send and wait at the ends of segments."""
        n = self._site
        self._site = n + 1
        if n == 0 and self._runtime.mesh.sizes["cfg"] == 1:  # before that all ranks draw alike
            self._generators = torch_states(self._runtime.mesh.device, self._cut.generators)
        if n >= len(self.local.work) or self.local.work[n].site.block != index:
            raise RuntimeError(f"block call {n} is not the one of the first call of this signature")
        work = self.local.work[n]
        arguments: list[Any] = []
        if work.flatten:
            arguments, _ = tree_flatten((args, kwargs))
            self._carried.keep("arg", n, self.local.keep_args.get(n, ()), arguments)
        if work.own:
            out = self._own(n, work, call, args, kwargs)
        elif work.single is not None:
            out = self._carried.unread(work.single)
        else:
            leaves = stand_ins(work.site, arguments, lambda leaf: self._carried.placeholder(n, leaf))
            self._carried.keep("out", n, self.local.keep_outs.get(n, ()), leaves)
            out = tree_unflatten(leaves, work.site.spec)
        if work.stop:
            self._stop(n)
        return out

    def _own(self, n: int, work: SiteWork, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls, ran, site = self._cut.calls, self._cut.ran, work.site
        calls.interceptor = None  # a block's own inner modules are no call sites
        given = tree_leaves((args, kwargs)) if work.aliases else ()
        out = call(*args, **kwargs)
        calls.interceptor = self
        ran[site.block] += 1
        if work.checked:
            leaves, _ = tree_flatten(out)
            if len(leaves) != len(site.leaves):
                raise RuntimeError(f"block call {n} returns {len(leaves)} values, not {len(site.leaves)}")
            for expected, got in zip(site.leaves, leaves, strict=True):
                check_kind(expected, got, f"block call {n}")
            if not same_memory(site, leaves, given):
                raise RuntimeError(f"block call {n} returns tensors that share memory in another way than in the first")
            self._carried.keep("out", n, self.local.keep_outs.get(n, ()), leaves)
        return out

    def _stop(self, n: int) -> None:
        """At the exit of a call site: send, wait, put in place what came, keep what is sent later."""
        ends = self.local.last_of.get(n)
        if ends is not None and ends < len(self.plan.hops):
            self._carried.send(ends)
            if ends >= self.local.last_own:
                raise _StopForward
        if n in self.local.pauses:
            self._coroutine.pause()  # until the schedule runs the segment after that hop
        self._carried.place(n)
        if ends is not None:
            self._carried.release(ends)
