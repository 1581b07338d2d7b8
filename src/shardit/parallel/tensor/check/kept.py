"""Finds results that processors expose."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardit.core.modules.state.holders import OWN
from shardit.parallel.tensor.rules import Family

HARMLESS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Tensor, nn.Module, type)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
CONTAINERS = (list, dict, set, tuple)


def exposing_attribute(processor: Any, family: Family) -> str | None:
    """Return the attribute through which a processor with unknown code may expose its results: an object that cannot be
    compared or restored. Returns None if there is none."""
    if processor is None or (family.processors and type(processor).__module__.startswith(family.processors)):
        return None
    for key, value in getattr(processor, "__dict__", {}).items():
        leaves = tree_leaves(value) if isinstance(value, CONTAINERS) else [value]
        if key not in OWN and not all(isinstance(leaf, (*HARMLESS, *FUNCTIONS)) for leaf in leaves):
            return key
    return None
