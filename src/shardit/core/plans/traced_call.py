"""Runs the first call of a signature: block by block on all ranks at once, traced, with the same computation as one
rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as _without_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from shardit.core.comm.barrier import checked_barrier, sendable
from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import (
    dump_with_tensors,
    first_byte,
    load_with_tensors,
    storage_bytes,
    view_bytes,
    view_near,
)
from shardit.core.modules.blocks import CutModel, inner_tensors
from shardit.core.modules.patching import set_tensor
from shardit.core.plans.call_plan import CallPlan, Leaf, Site, describe_result
from shardit.core.plans.derive import derive
from shardit.core.plans.trace import Trace, TraceContext
from shardit.core.runtime.flat_call import FlatCall, describe_leaf
from shardit.core.runtime.randomness import States, moved, states
from shardit.core.runtime.storages import storage_key
from shardit.core.runtime.versions import changed, mark
from shardit.errors import RankError, UnsupportedError

log = logging.getLogger(__name__)


class TracedCall:
    """Intercepts block calls during a first call: the owner runs the block and broadcasts its output.

    drawn: the states of the generators at the first block call.
    """

    def __init__(self, cut: CutModel, comm: Comm, hook: Callable[[], None] = lambda: None, trace: Trace | None = None):
        self.cut, self.owners, self.blocks, self.comm = cut, cut.owners, cut.blocks, comm
        self.trace = Trace() if trace is None else trace
        self.watch = TraceContext(self.trace, self._fetch)
        self._inner = inner_tensors(cut.model, cut.blocks)
        self._fetched: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.drawn: States = {}
        self._hook, self._last_owner = hook, -1
        self._shared = False  # every rank has the error that is being raised

    def run(self, forward: Callable[..., Any], call: FlatCall) -> tuple[Any, CallPlan]:
        """Run the forward; return its result, the same on every rank, and the plan of data for later calls.

        Collective. Raises the errors of the forward on every rank, and UnsupportedError if it cannot be cut into
        stages.
        """
        out = self._follow(forward, call, gradients=False)
        known = set(map(id, call.leaves))
        added = [
            leaf
            for leaf in tree_leaves((call.args, call.kwargs))
            if isinstance(leaf, torch.Tensor) and id(leaf) not in known
        ]
        if any(self.trace.knows(leaf) and self.trace.number(leaf) in self.trace.derived for leaf in added):
            raise UnsupportedError("the forward puts data derived from a block into a list or dict among its arguments")
        leaves, spec = tree_flatten(out)
        plan = derive(self.trace, leaves, spec, tuple(describe_result(leaf) for leaf in leaves))
        digests = self.comm.group.gather_objects(plan.digest())
        if len(set(digests)) > 1:
            raise UnsupportedError("ranks found different plans: the forward does not do the same on every rank")
        return out, plan

    def _follow(self, forward: Callable[..., Any], call: FlatCall, *, gradients: bool) -> Any:
        """Run the forward and record its trace."""
        self.trace.begin(call.leaves)
        try:
            with self.cut.calls.intercepted_by(self), torch.set_grad_enabled(gradients), self.watch:
                out = forward(*call.args, **call.kwargs)
            self._barrier("the end")
        except Exception as error:
            if not self._shared and not isinstance(error, RankError):
                self._barrier(error)
            raise
        if not self.trace.sites:
            raise UnsupportedError("the forward calls none of the model's blocks")
        if self.trace.mutated_input:
            raise UnsupportedError("the forward writes into one of its arguments")
        return out

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on its owner; broadcast its output and its changes."""
        with self.watch.paused():
            self._barrier(f"block {self.blocks[index][0]}")
            self.drawn = self.drawn or states(self.comm.group.device, [])
            given, _ = tree_flatten((args, kwargs))
            looks = tuple(map(describe_leaf, given))
            arguments = [leaf if isinstance(leaf, torch.Tensor) else None for leaf in given]
            owner = self.owners[index]
            if owner != self._last_owner:  # here a call of this kind lets others go on
                self._last_owner = owner
                self._hook()
            if owner == self.comm.rank:
                out, described, mutated = self._own(index, call, args, kwargs, arguments)
            else:
                out, described, mutated = self._other(owner, arguments)
            for q in mutated:
                tensor = arguments[q]
                assert tensor is not None
                self.comm.broadcast(storage_bytes(tensor, 0, tensor.untyped_storage().nbytes()), owner)
            leaves, spec = tree_flatten(out)
            site = Site(
                index, owner, spec, tuple(self._leaf(leaf, described) for leaf in leaves), looks, tuple(mutated)
            )
            hidden = len(described) - len({id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)})
            if hidden:
                raise UnsupportedError(
                    f"a block returns {hidden} tensor(s) inside an object that cannot be looked into"
                )
            self.trace.block(site, arguments, leaves, mutated)
        return out

    def _barrier(self, what: str | Exception) -> None:
        """Wait until all ranks reach the same point; raise on every rank if one of them is elsewhere or has failed."""
        self._shared = True
        differ = checked_barrier(self.comm, what)
        if differ is not None:
            raise UnsupportedError(
                f"the forward does not have the same control flow on every rank: {differ}, outside the blocks, where "
                "data of a block of another rank may be missing"
            )
        self._shared = isinstance(what, Exception)  # then all have failed, each with its own error

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor to use when code outside the blocks reads this one. A parameter of a block is broadcast by
        its owner, and every rank keeps it."""
        if id(tensor) in self._fetched:
            return self._fetched[id(tensor)][1]
        if id(tensor) not in self._inner:
            return tensor
        index, path = self._inner.pop(id(tensor))
        name, block = self.blocks[index]
        self.watch.recorder.paused = True
        self._barrier(f"parameter {name}.{path}")
        dense = torch.empty_like(tensor, device=self.comm.group.device, memory_format=torch.contiguous_format)
        if self.owners[index] == self.comm.rank:
            dense.copy_(tensor)
        self.comm.broadcast(dense, self.owners[index])
        self.watch.recorder.paused = False
        if tensor.is_meta:
            held = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=dense.device)
            held.copy_(dense)
            kind = nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held
            set_tensor(block, path, kind)
            self._fetched[id(tensor)] = (tensor, kind)
            log.info("%s.%s is read outside its block: every rank keeps it", name, path)
            return kind
        return tensor

    def _own(
        self, index: int, call: Any, args: Any, kwargs: Any, arguments: list[torch.Tensor | None]
    ) -> tuple[Any, dict[int, Leaf], list[int]]:
        before = [mark(t) for t in arguments]
        given, outline = tree_flatten((args, kwargs))
        drawn, device = states(self.comm.group.device, []), self.comm.group.device
        try:
            with _without_modes():  # code compiled by the block must not see the recorder
                out = call(*args, **kwargs)
            after, outline_after = tree_flatten((args, kwargs))
            if outline_after != outline or any(a is not b for a, b in zip(given, after, strict=True)):
                raise UnsupportedError(
                    "a block changes a list or dict among its arguments, which no other rank would see"
                )
            if moved(drawn, states(device, [])):
                self._drew(index)
        except Exception as error:
            self.comm.group.broadcast_object(sendable(error), self.comm.rank)
            self._shared = True
            raise
        self.cut.ran[index] += 1
        mutated = [q for q, t in enumerate(arguments) if t is not None and changed(t, before[q])]
        blob, tensors = dump_with_tensors(out)
        leaves = _describe(tensors, arguments)
        self.comm.group.broadcast_object((blob, leaves, mutated), self.comm.rank)
        for storage in _first_of_storage(leaves):
            tensor = tensors[storage]
            self.comm.broadcast(storage_bytes(tensor, 0, tensor.untyped_storage().nbytes()), self.comm.rank)
        return out, {id(t): leaf for t, leaf in zip(tensors, leaves, strict=True)}, mutated

    def _drew(self, index: int) -> None:
        """Handle a block that has drawn random numbers, on its owner."""
        raise UnsupportedError(
            f"block {self.blocks[index][0]} draws random numbers, which other ranks would not do: call .eval() "
            "on the model, or use pipeline_parallel_size=1 and cfg_parallel_size=1"
        )

    def _other(self, owner: int, arguments: list[torch.Tensor | None]) -> tuple[Any, dict[int, Leaf], list[int]]:
        message = self.comm.group.broadcast_object(None, owner)
        if isinstance(message, Exception):
            self._shared = True
            raise message
        blob, leaves, mutated = message
        memory: dict[int, torch.Tensor] = {}
        for number in _first_of_storage(leaves):
            buffer = torch.empty(leaves[number].nbytes, dtype=torch.uint8, device=self.comm.group.device)
            self.comm.broadcast(buffer, owner)
            memory[leaves[number].storage] = buffer
        tensors: list[torch.Tensor] = []
        for leaf in leaves:
            if leaf.kind == "arg":
                base = arguments[leaf.arg]
                assert base is not None
                tensors.append(base if leaf.same else view_near(base, leaf.offset, leaf.dtype, leaf.size, leaf.stride))
            else:
                start = leaf.offset * leaf.dtype.itemsize
                tensors.append(view_bytes(memory[leaf.storage], start, leaf.dtype, leaf.size, leaf.stride))
        out = load_with_tensors(blob, tensors)
        return out, {id(t): leaf for t, leaf in zip(tensors, leaves, strict=True)}, mutated

    def _leaf(self, leaf: Any, described: dict[int, Leaf]) -> Leaf:
        if isinstance(leaf, torch.Tensor):
            return described[id(leaf)]
        if isinstance(leaf, float):
            raise UnsupportedError("a block returns a number, which cannot be known before the block has run")
        return Leaf("value", value=leaf)


def _describe(tensors: list[torch.Tensor], arguments: list[torch.Tensor | None]) -> list[Leaf]:
    """Describe the tensors of a block's output: views of an argument's memory, and new ones."""
    owned_by_argument: dict[int, int] = {}
    for q, tensor in enumerate(arguments):
        if tensor is not None:
            owned_by_argument.setdefault(storage_key(tensor), q)
    storages: dict[int, int] = {}
    leaves = []
    for tensor in tensors:
        key = storage_key(tensor)
        shape = (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        if key in owned_by_argument:
            q = next((q for q, t in enumerate(arguments) if t is tensor), owned_by_argument[key])
            base = arguments[q]
            assert base is not None
            offset = first_byte(tensor) - first_byte(base)
            leaves.append(Leaf("arg", *shape, offset, arg=q, same=base is tensor))
        else:
            number = storages.setdefault(key, len(storages))
            offset, nbytes = int(tensor.storage_offset()), tensor.untyped_storage().nbytes()
            leaves.append(Leaf("tensor", *shape, offset, storage=number, nbytes=nbytes))
    return leaves


def _first_of_storage(leaves: list[Leaf]) -> list[int]:
    """Return for each new storage the number of the first leaf over it, in order."""
    first: dict[int, int] = {}
    for number, leaf in enumerate(leaves):
        if leaf.kind == "tensor":
            first.setdefault(leaf.storage, number)
    return list(first.values())
