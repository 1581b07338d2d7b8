"""Small tensors of a component that one rank owns: replicated on every rank, so reading one sends nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from shardit.core.modules.patching import set_tensor
from shardit.core.runtime.versions import changed, mark

SMALL_BYTES = 1 << 20
"""Maximum bytes of a component's tensors that are on every rank; the smallest tensors are chosen first."""


def small_tensors(module: nn.Module) -> frozenset[str]:
    """Return the names of the tensors that every rank keeps: the smallest of a component's buffers (of all its modules)
    and of its own parameters, up to SMALL_BYTES in total.

    Pipelines read these: means and deviations of latents, running statistics, learned tokens. Weights of layers are
    never included, however small: only the owner keeps them.
    """
    named = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers())}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in named.items()}
    chosen, room = set(), SMALL_BYTES
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        room -= sizes[name]
        if room < 0:
            break
        chosen.add(name)
    return frozenset(chosen)


class ReplicatedTensors:
    """Tensors of a component that every rank has, by name, with the writes of the owner."""

    def __init__(self, module: nn.Module, names: Collection[str] = ()):
        self.names = frozenset(names)
        pairs = {name: name.rpartition(".") for name in sorted(self.names)}
        self._homes = {name: (module.get_submodule(parent), leaf) for name, (parent, _, leaf) in pairs.items()}

    def snapshot(self) -> dict[str, tuple[torch.Tensor, Any]]:
        """Return a record for `changes`: a copy while a module trains, since torch does not count updates of running
        statistics."""
        trains = {name for name, (home, _) in self._homes.items() if home.training}
        return {name: (t, t.clone() if name in trains else mark(t)) for name, t in self._tensors().items()}

    def changes(self, before: dict[str, tuple[torch.Tensor, Any]]) -> dict[str, torch.Tensor]:
        """Return the tensors that were written to or replaced since the snapshot `before`."""
        now = self._tensors()
        return {name: now[name] for name, (t, at) in before.items() if now[name] is not t or changed(t, at)}

    def apply(self, changes: dict[str, torch.Tensor]) -> None:
        """Replace the tensors that the owner has changed."""
        for name, tensor in changes.items():
            home, leaf = self._homes[name]
            old: Any = home._parameters.get(leaf)
            set_tensor(home, leaf, tensor if old is None else nn.Parameter(tensor, old.requires_grad))

    def _tensors(self) -> dict[str, Any]:
        return {
            name: home._parameters[leaf] if leaf in home._parameters else home._buffers[leaf]
            for name, (home, leaf) in self._homes.items()
        }
