"""What code keeps from call to call, on modules and processors: undone after a comparison, and compared itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

HARMLESS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Tensor, nn.Module, type)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
CONTAINERS = (list, dict, set, tuple)


@dataclass(frozen=True)
class _Thing:
    attributes: dict[str, Any]
    values: dict[str, Any]
    contents: dict[str, Any]


State = list[_Thing]


def state_of(unit: nn.Module) -> State:
    """The attributes of a unit's modules and processors, and what lists, dicts and sets among them hold."""
    things: list[Any] = list(unit.modules())
    things += [p for m in things if (p := getattr(m, "processor", None)) is not None and hasattr(p, "__dict__")]
    found = []
    for thing in things:
        attributes: dict[str, Any] = thing.__dict__
        held = {k: copy.copy(v) for k, v in attributes.items() if k not in OWN and type(v) in (list, dict, set)}
        found.append(_Thing(attributes, dict(attributes), held))
    return found


def restore(state: State) -> None:
    """Undo what was set and put in since."""
    for thing in state:
        same_keys = thing.attributes.keys() == thing.values.keys()
        if not same_keys or any(thing.attributes[k] is not v for k, v in thing.values.items()):
            thing.attributes.clear()
            thing.attributes.update(thing.values)
        for key, held in thing.contents.items():
            container = thing.values[key]
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(held)


def kept_since(state: State) -> list[torch.Tensor]:
    """The tensors that were set or put in since."""
    tensors = []
    for thing in state:
        for key, value in thing.attributes.items():
            if key in OWN:
                continue
            old = {id(t) for t in _tensors(thing.contents.get(key, thing.values.get(key)))}
            tensors += [tensor for tensor in _tensors(value) if id(tensor) not in old]
    return tensors


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def hands_out(processor: Any) -> str | None:
    """The attribute through which a processor that is not diffusers' own may hand to others what it computes: an object
    that nobody can look into, or undo. None where there is none."""
    if processor is None or type(processor).__module__.startswith("diffusers.models."):
        return None
    for key, value in getattr(processor, "__dict__", {}).items():
        leaves = tree_leaves(value) if isinstance(value, CONTAINERS) else [value]
        if key not in OWN and not all(isinstance(leaf, (*HARMLESS, *FUNCTIONS)) for leaf in leaves):
            return key
    return None
