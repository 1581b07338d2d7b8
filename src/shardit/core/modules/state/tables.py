"""Tensors that each call sets again in modules, such as tables of rotary embeddings. They are no state if a call sets
them before it reads them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.modules.state.contents import nan_like
from shardit.core.modules.state.holders import entries, name_of, put_entries
from shardit.core.modules.state.module_state import State, same_numbers


@dataclass
class Table:
    """A tensor in the entry `key` of a module, and NaN in its place."""

    module: nn.Module
    key: Any
    tensor: torch.Tensor
    nan: torch.Tensor

    @property
    def is_unset(self) -> bool:
        """Whether the module has NaN there."""
        return entries(self.module).get(self.key) is self.nan

    def put(self, tensor: torch.Tensor) -> None:
        """Put a tensor there."""
        now = entries(self.module)
        put_entries(self.module, {**now, self.key: tensor}, now)


def tables(before: State, after: State, without: Collection[nn.Module]) -> dict[str, Table]:
    """Return the entries of modules that have other tensors of the same numbers in a later state, by their full names.
    without: modules that are left out."""
    found = {}
    for number, new in after.holders.items():
        old, module = before.holders.get(number), new.holder
        if old is None or new.outside or not isinstance(module, nn.Module) or module in without:
            continue
        for key, tensor in new.held.items():
            earlier = old.held.get(key)
            if tensor is not earlier and same_numbers(tensor, earlier):
                nan = nan_like(tensor)
                if nan is not tensor:
                    found[name_of(new.path, key)] = Table(module, key, tensor, nan)
    return found
