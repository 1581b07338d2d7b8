"""Operations of this package in graphs of torch.compile, which it does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("shardit", "FRAGMENT")  # operations exist as long as this
_effects: Any = getattr(_library, "_register_effectful_op", None)


def define_operation(schema: str, run: Callable[..., Any], describe: Callable[..., Any]) -> bool:
    """Define `torch.ops.shardit.<name>`, without gradients, and return whether graphs can contain it; if not (an older
    torch), callers break the graph.

    schema: of torch, with the name. describe: returns results of the same shapes, dtypes and strides, without data.
    Messages are an effect: a graph keeps the order of these operations, and those whose results nothing reads.
    """
    if _effects is None:
        return False
    name = f"shardit::{schema.partition('(')[0]}"
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, describe, lib=_library)
    _effects(name, torch.library.EffectType.ORDERED)
    return True
