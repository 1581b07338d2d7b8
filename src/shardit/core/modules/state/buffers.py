"""Buffers that a loss updates, such as the running statistics of a norm: each micro-batch counts once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from shardit.core.modules.blocks import CutModel
from shardit.core.runtime.versions import changed

Copies = dict[tuple[nn.Module, str], tuple[torch.Tensor, torch.Tensor]]
"""Buffers by their module and name in it, each with a copy of its content."""


def copies_of(model: nn.Module, without: Collection[nn.Module] = ()) -> Copies:
    """Return the buffers of a model; `without`: modules whose own ones are left out."""
    with without_modes():
        return {
            (module, name): (buffer, buffer.detach().clone())
            for module in model.modules()
            if module not in without
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta
        }


def updated(before: Copies) -> list[tuple[nn.Module, str]]:
    """Return the buffers that have other values now."""
    with without_modes():
        now = {key: key[0]._buffers.get(key[1]) for key in before}
        return [
            key
            for key, (_, copy) in before.items()
            if (found := now[key]) is None or found.shape != copy.shape or changed(found, copy)
        ]


@contextmanager
def buffers_kept(model: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[None]:
    """Run on copies of buffers for a while: what runs is a trial, or was counted already. Graphs of autograd may keep
    the copies. Modules with buffers keep their attributes, too: these may hold how far a buffer is computed."""
    before = copies_of(model, without)
    attributes = {module: dict(vars(module)) for module, _ in before}
    try:
        for (module, name), (_, copy) in before.items():
            module._buffers[name] = copy
        yield
    finally:
        for (module, name), (buffer, _) in before.items():
            module._buffers[name] = buffer
        for module, known in attributes.items():
            for name in vars(module).keys() - known.keys():
                del vars(module)[name]
            vars(module).update(known)


def modules_of_blocks(cut: CutModel) -> set[nn.Module]:
    """Return all modules in blocks."""
    return {module for _, block in cut.blocks for module in block.modules()}


def name_of(model: nn.Module, buffer: tuple[nn.Module, str]) -> str:
    """Return the full name of a buffer."""
    path = next(path for path, module in model.named_modules() if module is buffer[0])
    return f"{path}.{buffer[1]}" if path else buffer[1]
