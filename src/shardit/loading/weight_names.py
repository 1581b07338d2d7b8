"""Which weight file of a component is the one to load, from file names alone."""

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
class Choice:
    """The file to start from: an index of shards, or the only file."""

    name: str
    sharded: bool


def is_weights(name: str) -> bool:
    """Whether a file holds weights, in any format."""
    return name.endswith((".safetensors", *_PICKLE, *_OTHER))


def choose(names: Iterable[str], where: str) -> Choice:
    """The index or file that diffusers and transformers load by default.

    `names` are the plain file names of one component folder, `where` names the folder in errors.
    Raises InputError (no weights) or UnsupportedError (only pickles, only a variant such as fp16).
    """
    held = set(names)
    for name in _ORDER:
        if name in held:
            return Choice(name, name.endswith(".json"))
    variants = sorted({match[1] for name in held if (match := _VARIANT.match(name))})
    if variants:
        raise UnsupportedError(
            f"{where} holds only the weight variant {' and '.join(variants)}: "
            f"rename the files to plain names ({_DIFFUSERS} or {_TRANSFORMERS}) or use a folder with default weights"
        )
    if any(name.endswith(_PICKLE) for name in held):
        raise UnsupportedError(
            f"{where} holds only pickled weights, which can run code: convert them to safetensors "
            "(load with diffusers, then save_pretrained)"
        )
    raise InputError(f"{where} has no weights ({_DIFFUSERS} or {_TRANSFORMERS}): download or copy it again")
