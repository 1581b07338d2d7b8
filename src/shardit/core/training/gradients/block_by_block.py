"""The gradients of a loss over ranks of which none has the whole model, block by block, without a schedule.

All ranks run the loss together, and its backward. Each block runs on its owner and is one node of autograd's graph on
every rank; the backward of that node runs the block once more on its owner, as in gradient checkpointing. Code outside
of blocks, and its backward, runs on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.comm.p2p import Comm
from shardit.core.components.owned import call_on
from shardit.core.modules.blocks import CutModel
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import generators_kept, set_torch_states, torch_states
from shardit.core.runtime.versions import changed, mark
from shardit.errors import UnsupportedError


@dataclass
class BlockNodes:
    """Intercepts block calls. The gradients of the parameters of a block are on its owner, those of others on every
    rank."""

    cut: CutModel
    comm: Comm

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on its owner. Raises UnsupportedError on all ranks if it writes to its arguments."""
        leaves, spec = tree_flatten((args, kwargs))
        places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def run(*tensors: torch.Tensor) -> Any:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            own_args, own_kwargs = tree_unflatten(given, spec)
            with self.cut.calls.intercepted_by(None):
                return call(*own_args, **own_kwargs)

        node = _Node(self, index, run)
        # Without an input that requires a gradient, autograd would leave out the parameters of the first blocks.
        anchor = torch.zeros((), requires_grad=True)
        made = _BlockFunction.apply(node, anchor, *(leaves[place] for place in places))
        out = [leaf if place is None else made[place] for leaf, place in zip(node.leaves, node.places, strict=True)]
        return tree_unflatten(out, node.spec)


class _Node:
    """One block call. leaves: of its output; places: of each leaf among the tensors that the block has made, None if it
    is none of these. A block may return one tensor twice."""

    def __init__(self, nodes: BlockNodes, index: int, run: Callable[..., Any]):
        self.nodes, self.owner, self.run = nodes, nodes.cut.owners[index], run
        self.name, self.device = nodes.cut.blocks[index][0], nodes.comm.group.device
        self.states, self.modes = torch_states(self.device), _autocast(self.device.type)
        self.leaves: list[Any] = []
        self.places: list[int | None] = []
        self.spec: Any = None

    def forward(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the block on its owner; return the tensors that it has made, on every rank."""

        def run() -> Any:
            before = [mark(tensor) for tensor in tensors]
            out = self.run(*tensors)
            if any(changed(tensor, known) for tensor, known in zip(tensors, before, strict=True)):
                raise UnsupportedError(f"block {self.name} writes to its arguments")
            return out

        out = call_on(self.nodes.comm, self.owner, run, tensors)
        self.leaves, self.spec = tree_flatten(out)
        materialize(self.leaves)
        given, known = set(map(id, tensors)), dict[int, int]()
        for leaf in self.leaves:
            is_new = isinstance(leaf, torch.Tensor) and id(leaf) not in given
            self.places.append(known.setdefault(id(leaf), len(known)) if is_new else None)
        return self._made(self.leaves)

    def _made(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Return the tensors among the leaves that the block has made, each once."""
        found = {place: leaf for leaf, place in zip(leaves, self.places, strict=True) if place is not None}
        return [found[place] for place in sorted(found)]

    def backward(
        self, tensors: Sequence[torch.Tensor], wanted: Sequence[bool], gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Run the block once more on its owner, and its backward; return the gradients of its arguments."""

        def run() -> list[torch.Tensor | None]:
            given = [one.detach().requires_grad_(needs) for one, needs in zip(tensors, wanted, strict=True)]
            with generators_kept(self.device), torch.enable_grad(), torch.autocast(self.device.type, **self.modes):
                set_torch_states(self.states, self.device)
                made = self._made(tree_flatten(self.run(*given))[0])
            pairs = [(a, b) for a, b in zip(made, gradients, strict=True) if b is not None and a.requires_grad]
            if pairs:
                torch.autograd.backward([a for a, _ in pairs], [b for _, b in pairs])
            return [one.grad for one in given]

        found = call_on(self.nodes.comm, self.owner, run)
        materialize(found)
        return found


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node: _Node, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.node, ctx.tensors = node, tensors
        made = [one.clone() for one in node.forward(tensors)]  # code outside may write to them, but not to views
        ctx.mark_non_differentiable(*(one for one in made if not one.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        found = ctx.node.backward(ctx.tensors, ctx.needs_input_grad[2:], gradients)
        return (None, None, *found)


def _autocast(device: str) -> dict[str, Any]:
    """Return the present arguments of `torch.autocast`."""
    return {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
