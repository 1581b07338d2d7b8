"""Blocks whose data is on another stage than the one that runs them: they are sent there before the first step.

A rank may load only the blocks that it would run in the order of registration. The watched first loss may find that
they run in another order, and then other stages own them.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import ALIGN
from shardit.core.modules.blocks import CutModel, lacks_data
from shardit.core.modules.patching import set_tensor
from shardit.errors import InputError


def supply_blocks(cut: CutModel, comm: Comm) -> bool:
    """Send each block whose owner lacks its data from the first stage that has it; return whether any stage lacks any
    block. Collective; raises InputError on all stages if a block is on none."""
    if comm.size == 1:
        return False
    held = comm.group.gather_objects([None if lacks_data(block) else _skews(block) for _, block in cut.blocks])
    for number, (name, block) in enumerate(cut.blocks):
        owner = cut.owners[number]
        if held[owner][number] is not None:
            continue
        source = next((rank for rank, of_rank in enumerate(held) if of_rank[number] is not None), None)
        if source is None:
            raise InputError(f"no rank has the weights of {name}: load them on one of the stages, or on all")
        if comm.rank == source:
            for tensor in _tensors(block):
                comm.group.send(tensor.detach(), owner)
        elif comm.rank == owner:
            _receive(cut.model, block, held[source][number], comm, source)
    return any(one is None for of_rank in held for one in of_rank)


def _tensors(block: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a block, tied ones once."""
    return [*block.parameters(), *block.buffers()]


def _skews(block: nn.Module) -> list[int]:
    """Return the bytes of each tensor past the last aligned address: in some CPU kernels the last bits of a product
    depend on alignment."""
    return [tensor.data_ptr() % ALIGN for tensor in _tensors(block)]


def _receive(model: nn.Module, block: nn.Module, skews: list[int], comm: Comm, source: int) -> None:
    """Receive the tensors of a block, and put those that are missing here into the model under all their names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names[id(tensor)].append(name)
    for tensor, skew in zip(_tensors(block), skews, strict=True):
        data = comm.group.recv(tensor.shape, tensor.dtype, source)
        if not tensor.is_meta:
            continue
        if data.device.type == "cpu":
            data = _at(skew, data)
        made = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        for name in names[id(tensor)]:
            set_tensor(model, name, made)


def _at(skew: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor that begins so many bytes past an aligned address."""
    memory = torch.empty(skew + tensor.nbytes, dtype=torch.uint8)
    return memory[skew:].view(tensor.dtype).view(tensor.shape).copy_(tensor)
