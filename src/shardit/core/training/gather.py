"""Collects a cut model on the first stage for a while, to save it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardit.core.comm.p2p import Comm
from shardit.core.modules.blocks import CutModel
from shardit.core.modules.patching import set_tensor
from shardit.core.training.gradients.holdings import Holdings


@contextmanager
def whole(cut: CutModel, held: Holdings, comm: Comm, wanted: Callable[[str], bool]) -> Iterator[None]:
    """Give the first stage the data of all parameters and buffers whose names are `wanted`, in memory of the host.
    Collective."""
    if comm.size == 1:
        yield
        return
    before: dict[str, torch.Tensor] = {}
    try:
        for name, owner in [*held.owner.items(), *_buffers(cut)]:
            if owner and wanted(name):
                _move(cut.model, name, owner, comm, before)
        if comm.rank == 0:
            for name, first in held.ties.items():
                tensor = _at(cut.model, first)
                if wanted(name) and _at(cut.model, name) is not tensor:
                    before[name] = _at(cut.model, name)
                    set_tensor(cut.model, name, tensor)
        yield
    finally:
        for name, tensor in before.items():
            set_tensor(cut.model, name, tensor)


def _move(model: nn.Module, name: str, owner: int, comm: Comm, before: dict[str, torch.Tensor]) -> None:
    """Send a tensor from its owner to the first stage, which puts it into the model."""
    tensor = _at(model, name)
    if comm.rank == owner:
        comm.group.send(tensor.detach(), 0)
    elif comm.rank == 0:
        data = comm.group.recv(tensor.shape, tensor.dtype, owner).cpu()
        before[name] = tensor
        set_tensor(model, name, nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data)


def _buffers(cut: CutModel) -> Iterator[tuple[str, int]]:
    """Yield the names of the buffers of blocks that a checkpoint has, and their owners."""
    for (name, block), owner in zip(cut.blocks, cut.owners, strict=True):
        for path, module in block.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    yield ".".join(filter(None, (name, path, key))), owner


def _at(model: nn.Module, name: str) -> torch.Tensor:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found
