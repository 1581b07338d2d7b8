"""Counts the multiplications of matrix products, convolutions and attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
LIKE = {ON_CPU: torch.ops.aten._scaled_dot_product_flash_attention}
"""An operation that torch does not count, and the one that counts the same."""


class Multiplications(TorchDispatchMode):
    """Adds up the multiplications of the operations in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_higher_order_operators = True
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet: Any = getattr(func, "_overloadpacket", None)
        count = flop_registry.get(cast("Any", LIKE.get(packet, packet)))
        if count is None and isinstance(func, torch._ops.OpOverload) and torch.is_inference_mode_enabled():
            with self:  # in inference mode, products arrive as the operations that are made of them
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out) // 2
        return out
