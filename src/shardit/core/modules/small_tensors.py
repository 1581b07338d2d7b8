"""The small tensors of a component that one rank owns: every rank has them, and reading one moves nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from shardit.core.modules.patching import put
from shardit.core.runtime.versions import changed, mark

SMALL_BYTES = 1 << 20
"""What is on every rank of a component takes at most as many bytes; the smallest tensors come first."""


def small_tensors(module: nn.Module) -> frozenset[str]:
    """The names of the tensors of a component that every rank is to have: of its buffers, wherever they are, and of
    the parameters of the component itself the smallest, as far as SMALL_BYTES go.

    That is what pipelines read: means and deviations of latents, running statistics, learned tokens. The weights of its
    layers are not among them however small they are: they are what only one rank is to have.
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


class Everywhere:
    """Tensors of a component by name, and what its owner writes to them."""

    def __init__(self, module: nn.Module, names: Collection[str] = ()):
        self.names = frozenset(names)
        pairs = {name: name.rpartition(".") for name in sorted(self.names)}
        self._homes = {name: (module.get_submodule(parent), leaf) for name, (parent, _, leaf) in pairs.items()}

    def look(self) -> dict[str, tuple[torch.Tensor, Any]]:
        """What tells `written` later which of them were changed: while a module trains, a copy, since torch does not
        count how often running statistics are updated."""
        trains = {name for name, (home, _) in self._homes.items() if home.training}
        return {name: (t, t.clone() if name in trains else mark(t)) for name, t in self._tensors().items()}

    def written(self, before: dict[str, tuple[torch.Tensor, Any]]) -> dict[str, torch.Tensor]:
        """Those that were written to or replaced since `look`."""
        now = self._tensors()
        return {name: now[name] for name, (t, at) in before.items() if now[name] is not t or changed(t, at)}

    def take(self, news: dict[str, torch.Tensor]) -> None:
        """Put what another rank has written in place of what is here."""
        for name, tensor in news.items():
            home, leaf = self._homes[name]
            old: Any = home._parameters.get(leaf)
            put(home, leaf, tensor if old is None else nn.Parameter(tensor, old.requires_grad))

    def _tensors(self) -> dict[str, Any]:
        return {
            name: home._parameters[leaf] if leaf in home._parameters else home._buffers[leaf]
            for name, (home, leaf) in self._homes.items()
        }
