"""`generate` and calls of a causal language model over stages: the code of transformers runs on every rank."""

from __future__ import annotations

import functools
from typing import Any

import torch

from shardit.core.decoder.link import Link
from shardit.core.decoder.stage_tensor import settled


def members_of(model: Any, link: Link) -> dict[str, Any]:
    """The methods that a model gets."""
    own_call, own_generate = type(model).__call__, type(model).generate
    generating: list[bool] = []

    @functools.wraps(own_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = own_call(self, *args, **kwargs)
        return out if generating else plain(out)

    @functools.wraps(own_generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        generating.append(True)
        try:
            return plain(own_generate(self, *args, **kwargs))
        finally:
            generating.pop()

    return {"__call__": __call__, "generate": generate}


def plain(out: Any) -> Any:
    """A result with plain tensors on every rank."""
    if isinstance(out, dict):  # a ModelOutput
        for name, value in list(out.items()):
            out[name] = settled(value)
        return out
    return settled(out)
