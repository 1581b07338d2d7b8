"""Watches the first loss of a signature: on all stages at once, block by block, with the computation of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from shardit.core.comm.p2p import Comm
from shardit.core.modules.blocks import CutModel
from shardit.core.modules.state.buffers import Copies, copies_of, modules_of_blocks, name_of, updated
from shardit.core.plans.call_plan import Address
from shardit.core.plans.trace import Trace
from shardit.core.plans.traced_call import TracedCall
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.randomness import any_moved, torch_states
from shardit.core.training.loss_plan import Layout
from shardit.errors import InputError, UnsupportedError


@dataclass
class LossTrace(Trace):
    """The events of a loss. decided: what was read on the host, after how many block calls."""

    decided: list[tuple[int, str]] = field(default_factory=list)

    def reads_on_host(self, what: str) -> None:
        """Note it: after the last block there is one stage that does anything next."""
        self.decided.append((len(self.sites), what))

    def refuse_decisions(self) -> None:
        """Raise UnsupportedError if code between blocks depends on values that one stage alone has."""
        for after, what in self.decided:
            if after < len(self.sites):
                super().reads_on_host(what)


class WatchedLoss(TracedCall):
    """Intercepts block calls while a loss is watched.

    layouts: of the tensors among arguments and outputs of blocks. outside: names of parameters of blocks that
    code outside the block reads. drawing: blocks that drew random numbers on this rank. updates: code outside of blocks
    updates buffers. autocast: a block was called under it.
    """

    def __init__(self, cut: CutModel, comm: Comm):
        self.seen = LossTrace()
        super().__init__(cut, comm, trace=self.seen)
        self.layouts: dict[Address, Layout] = {}
        self.outside: list[str] = []
        self.drawing: list[int] = []
        self.updates = self.autocast = False
        self._states: list[Any] = []
        self._buffers: Copies = {}

    def watch_loss(self, loss: Callable[[], Any], call: FlatCall) -> torch.Tensor:
        """Run the loss; return it, the same on every rank. Collective."""
        start = copies_of(self.cut.model, modules_of_blocks(self.cut))
        out = self._follow(lambda *_: loss(), call, gradients=True)
        self.updates = bool(updated(start))
        self._refuse_late_updates()
        self.seen.refuse_decisions()
        torch.clear_autocast_cache()  # holds weights that were cast without gradients
        if not isinstance(out, torch.Tensor) or out.numel() != 1 or not out.is_floating_point():
            shape = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise InputError(f"loss must return a tensor with one floating-point number, not {shape}")
        self.drawing = sorted({one for of_rank in self.comm.group.gather_objects(self.drawing) for one in of_rank})
        return out

    def _refuse_late_updates(self) -> None:
        """Raise UnsupportedError if code after the first block updates a buffer, which stages without the data of
        blocks would do otherwise."""
        for buffer in updated(self._buffers):
            raise UnsupportedError(
                f"code after the first block updates {name_of(self.cut.model, buffer)}, which the stages would not do "
                "alike: call eval() of that module, or use pipeline_parallel_size=1"
            )

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on its owner without gradients; note the layouts of tensors."""
        if not torch.is_grad_enabled():
            raise UnsupportedError(
                f"block {self.blocks[index][0]} is called without gradients inside a forward with gradients: for "
                "gradient checkpointing set use_reentrant=False"
            )
        site = len(self.trace.sites)
        self.autocast |= torch.is_autocast_enabled(self.comm.group.device.type)
        with self.watch.paused():
            self._buffers = self._buffers or copies_of(self.cut.model, modules_of_blocks(self.cut))
            self._refuse_draws_between(index)
            self._note(site, "arg", (args, kwargs))
        with torch.no_grad():
            out = super().block_call(index, call, args, kwargs)
        with self.watch.paused():
            self._note(site, "out", out)
            self._states = torch_states(self.comm.group.device)
        return out

    def _note(self, site: int, kind: str, values: Any) -> None:
        for number, leaf in enumerate(tree_flatten(values)[0]):
            if isinstance(leaf, torch.Tensor):
                self.layouts[Address(site, kind, number)] = Layout.of(leaf)

    def _drew(self, index: int) -> None:
        self.drawing.append(index)

    def _refuse_draws_between(self, index: int) -> None:
        """Raise UnsupportedError if code between blocks has drawn: a stage that does not run the blocks before has
        other states of the generators there."""
        if self._states and any_moved(self._states, torch_states(self.comm.group.device)):
            raise UnsupportedError(
                f"code before block {self.blocks[index][0]} draws random numbers between block calls: draw before the "
                "call of the model, or use pipeline_parallel_size=1"
            )

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._inner.get(id(tensor))
        if place is not None:
            self.outside.append(f"{self.blocks[place[0]][0]}.{place[1]}")
        return super()._fetch(tensor)
