"""Adapters of a pipeline whose weights lie on several ranks: what looks at the values of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardit.core.comm.barrier import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.digests import named
from shardit.diffusion.sharding.components import components_of
from shardit.errors import UnsupportedError


def fusing(own_method: Callable[..., Any], ranks: Comm, models: Callable[[Any], Iterable[nn.Module]]) -> Any:
    """A `fuse_lora` for what is sharded. `models`: those of the object whose method it is."""

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
        for failure in ranks.group.gather_objects(error):
            if failure is not None:
                raise failure

    return fuse_lora


PADDING = {
    "load_lora_adapter": ("enable_lora_hotswap", "_prepare_lora_hotswap_kwargs"),
    "load_adapter": ("enable_peft_hotswap", "_prepare_peft_hotswap_kwargs"),
}
"""Methods of models that load adapters (of diffusers, of transformers), what has the first one padded to a number of
rows that fits all later ones, and where that is noted until it is loaded."""


def unpadded(cls: type, title: str, denoises: bool) -> dict[str, Any]:
    """The methods of a class for a model of which some ranks have a part only: adapters are loaded as they are.

    What is padded gets memory, which blocks of other ranks have not. denoises: whether it is the model that adapters
    are for; a pipeline tells all that it has.
    """
    members: dict[str, Any] = {}
    for load, (enable, noted) in PADDING.items():
        why = (
            f"{title}: {enable} pads adapters, of which each rank has a part: call it and load the first adapter "
            "before parallelize, or swap adapters of the same rank (r) without it"
        )
        if hasattr(cls, load):
            members[load] = _refused_if(getattr(cls, load), why, noted)
        if hasattr(cls, enable) and denoises:
            members[enable] = _refused_if(getattr(cls, enable), why, None)
    return members


def _refused_if(own_method: Callable[..., Any], why: str, noted: str | None) -> Callable[..., Any]:
    """A method that raises UnsupportedError, always or where the attribute `noted` of its model is not None."""

    @functools.wraps(own_method)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if noted is None or getattr(self, noted, None) is not None:
            raise UnsupportedError(why)
        return own_method(self, *args, **kwargs)

    return method


def moving(own_method: Callable[..., Any]) -> Any:
    """A `set_lora_device` of a pipeline that is sharded: each rank moves the adapters that it has."""

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
