"""Adapters of a pipeline whose weights lie on several ranks: what looks at the values of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardit.core.comm.checkpoint import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.digests import named
from shardit.diffusion.sharding.components import components_of


def fusing(own_method: Callable[..., Any], ranks: Comm, models: Callable[[Any], Iterable[nn.Module]]) -> Any:
    """A `fuse_lora` for what is spread. `models`: those of the object whose method it is."""

    @functools.wraps(own_method)
    def fuse_lora(self: Any, *args: Any, **kwargs: Any) -> None:
        if not named(own_method, args, kwargs).get("safe_fusing"):
            own_method(self, *args, **kwargs)
            return
        error = None
        with _looked_at_elsewhere(models(self)):
            try:
                own_method(self, *args, **kwargs)
            except Exception as failure:
                error = sendable(failure)
        for failure in ranks.gather_objects(error):
            if failure is not None:
                raise failure

    return fuse_lora


def moving(own_method: Callable[..., Any]) -> Any:
    """A `set_lora_device` of a pipeline that is spread: each rank moves the adapters that it has."""

    @functools.wraps(own_method)
    def set_lora_device(self: Any, *args: Any, **kwargs: Any) -> None:
        absent = [
            part
            for model in (components_of(self) or {}).values()
            for name, part in model.named_modules()
            if ".lora_" in name and any(p.is_meta for p in part.parameters(recurse=False))
        ]
        for part in absent:
            vars(part)["to"] = lambda *_, **__: None
        try:
            own_method(self, *args, **kwargs)
        finally:
            for part in absent:
                del vars(part)["to"]

    return set_lora_device


@contextmanager
def _looked_at_elsewhere(models: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile adapters do not look whether their weights are finite where another rank has them, and looks."""
    layers: list[Any] = [
        layer
        for model in models
        for layer in model.modules()
        if hasattr(layer, "base_layer") and hasattr(layer, "merge") and any(p.is_meta for p in layer.parameters())
    ]
    for layer in layers:
        layer.merge = _merge(layer.merge)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("merge", None)


def _merge(own_method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own_method)  # diffusers reads the signature
    def merge(safe_merge: bool = False, **kwargs: Any) -> None:
        own_method(safe_merge=False, **kwargs)

    return merge
