"""Chooses the weight file of a component to load, from file names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shardit.errors import InputError, UnsupportedError

# diffusers' name first; the libraries look for an index before (diffusers) or after (transformers) the single file.
_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS = "model.safetensors"
_ORDER = (_DIFFUSERS + ".index.json", _DIFFUSERS, _TRANSFORMERS, _TRANSFORMERS + ".index.json")

_PICKLE = (".bin", ".pt", ".pth", ".ckpt")
_OTHER = (".onnx", ".pb", ".onnx_data", ".msgpack", ".h5", ".gguf", ".tflite", ".ot")
_VARIANT = re.compile(r"^(?:diffusion_pytorch_)?model\.(?!safetensors)([\w-]+?)(?:-\d{5}-of-\d{5})?\.safetensors$")


@dataclass(frozen=True)
class WeightsFile:
    """The file to start from: an index of shards, or the only file."""

    name: str
    sharded: bool
    variant: str | None = None
    """The infix of its name, None for the default weights."""


def is_weights(name: str) -> bool:
    """Return whether a file contains weights, in any format."""
    return name.endswith((".safetensors", *_PICKLE, *_OTHER))


def variants_among(names: Iterable[str]) -> list[str]:
    """Return the infixes of weight files ("fp16"), sorted."""
    return sorted({match[1] for name in names if (match := _VARIANT.match(name))})


def _with_variant(name: str, variant: str) -> str:
    """Insert an infix into the name of an index or file, as diffusers does."""
    if name.endswith(".json"):
        return f"{name.removesuffix('.json')}.{variant}.json"
    return f"{name.removesuffix('.safetensors')}.{variant}.safetensors"


def choose(names: Iterable[str], where: str, variant: str | None = None) -> WeightsFile:
    """Return the index or file that diffusers and transformers load: that of `variant` if there is one, else the
    default.

    names: plain file names of one component folder. where: name of the folder in errors.
    Raises InputError (no weights, only another variant) or UnsupportedError (only pickles).
    """
    held = set(names)
    for name in _ORDER if variant else ():
        if (of_variant := _with_variant(name, str(variant))) in held:
            return WeightsFile(of_variant, of_variant.endswith(".json"), variant)
    for name in _ORDER:
        if name in held:
            return WeightsFile(name, name.endswith(".json"))
    if variants := variants_among(held):
        raise InputError(
            f"{where} holds only the weight variant {' and '.join(variants)}: give variant={variants[0]!r} "
            f"(--variant {variants[0]} on the command line)"
        )
    if any(name.endswith(_PICKLE) for name in held):
        raise UnsupportedError(
            f"{where} holds only pickled weights, which can run code: convert them to safetensors "
            "(load it with the library that wrote it, then save_pretrained)"
        )
    raise InputError(f"{where} has no weights ({_TRANSFORMERS} or {_DIFFUSERS}): download or copy it again")
