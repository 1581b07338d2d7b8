"""Collects a cut model on the first rank for a while, to save it."""

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
from shardit.core.training.gradients.slices import TensorSlices


@contextmanager
def whole(
    cut: CutModel, held: Holdings, comm: Comm, slices: TensorSlices, wanted: Callable[[str], bool]
) -> Iterator[None]:
    """Give the first rank the data of all parameters and buffers whose names are `wanted`, in memory of the host.
    Collective over stages and tensor ranks."""
    before: dict[str, torch.Tensor] = {}
    try:
        for name, owner in [*held.owner.items(), *_buffers(cut)]:
            if (owner or name in slices.cuts) and wanted(name):
                _move(cut.model, name, owner, comm, slices, before)
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


def _move(
    model: nn.Module, name: str, owner: int, comm: Comm, slices: TensorSlices, before: dict[str, torch.Tensor]
) -> None:
    """Join the slices of a tensor on the stage that owns it, and send it from there to the first one, which puts it
    into the model."""
    tensor = _at(model, name)
    data = slices.whole(name, tensor.detach()) if comm.rank == owner else None
    if slices.index:  # the first tensor rank of each stage sends
        return
    if data is not None and owner:
        comm.group.send(data, 0)
    elif comm.rank == 0:
        data = comm.group.recv(slices.shape(name, tensor), tensor.dtype, owner) if data is None else data
        before[name] = tensor
        data = data.cpu()
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
