"""Adapter methods of pipelines whose weights are on several ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardit.core.comm.barrier import sendable
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.digests import named, short_hash
from shardit.diffusion.sharding.components import components_of
from shardit.errors import UnsupportedError


def collective_fuse(own_method: Callable[..., Any], ranks: Comm, models: Callable[[Any], Iterable[nn.Module]]) -> Any:
    """Return a `fuse_lora` for sharded models. `models`: returns the models of the object that has the method."""

    @functools.wraps(own_method)
    def fuse_lora(self: Any, *args: Any, **kwargs: Any) -> None:
        if not named(own_method, args, kwargs).get("safe_fusing"):
            own_method(self, *args, **kwargs)
            return
        error = None
        with _local_checks_only(models(self)):
            try:
                own_method(self, *args, **kwargs)
            except Exception as failure:
                error = sendable(failure)
        for failure in ranks.group.gather_objects(error):
            if failure is not None:
                raise failure

    return fuse_lora


class AdapterScales:
    """The scales and the active adapters of the adapter layers of a model, as one hash."""

    def __init__(self, model: nn.Module):
        layers = [vars(layer) for layer in model.modules() if hasattr(layer, "base_layer")]
        self._names = [[name for name in _SCALES if name in own] for own in layers]
        self._layers, self._before, self._hash = layers, None, b""

    @property
    def any(self) -> bool:
        """Whether there are adapters."""
        return bool(self._layers)

    def hash(self) -> bytes:
        """Return the hash of the present values; empty without adapters."""
        pairs = zip(self._layers, self._names, strict=True)
        now = [copy.copy(own[name]) for own, names in pairs for name in names]
        if now != self._before:
            self._before, self._hash = now, short_hash(repr(now).encode())
        return self._hash if self._layers else b""


_SCALES = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
"""The attributes of peft's layers that decide with which weight adapters count."""

PADDING = {
    "load_lora_adapter": ("enable_lora_hotswap", "_prepare_lora_hotswap_kwargs"),
    "load_adapter": ("enable_peft_hotswap", "_prepare_peft_hotswap_kwargs"),
}
"""Methods of models that load adapters (of diffusers, of transformers). Values: the method that makes the first adapter
be padded to the rank of all later ones, and the attribute that holds this setting until then."""


def unpadded_members(cls: type, title: str, denoises: bool) -> dict[str, Any]:
    """Return the methods of a class for a model that is partial on some ranks: adapters are loaded without padding.

    Padding allocates memory, which blocks of other ranks do not have. denoises: whether adapters are meant for this
    model; a pipeline calls `enable` on all its models.
    """
    members: dict[str, Any] = {}
    for load, (enable, setting) in PADDING.items():
        why = (
            f"{title}: {enable} pads adapters, of which each rank has a part: call it and load the first adapter "
            "before parallelize, or swap adapters of the same rank (r) without it"
        )
        if hasattr(cls, load):
            members[load] = _refused_if(getattr(cls, load), why, setting)
        if hasattr(cls, enable) and denoises:
            members[enable] = _refused_if(getattr(cls, enable), why, None)
    return members


def _refused_if(own_method: Callable[..., Any], why: str, setting: str | None) -> Callable[..., Any]:
    """Return a method that raises UnsupportedError, always or if the attribute `setting` of its model is not None."""

    @functools.wraps(own_method)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if setting is None or getattr(self, setting, None) is not None:
            raise UnsupportedError(why)
        return own_method(self, *args, **kwargs)

    return method


def local_set_device(own_method: Callable[..., Any]) -> Any:
    """Return a `set_lora_device` for a sharded pipeline: each rank moves its own adapters."""

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
def _local_checks_only(models: Iterable[nn.Module]) -> Iterator[None]:
    """Skip the check for finite weights in adapters that another rank has: that rank does the check."""
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
