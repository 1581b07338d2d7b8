"""The reference: a plain diffusers pipeline on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_plain(
    folder: str | Path, *, dtype: str | torch.dtype | None = None, pipeline_class: str | None = None, **kw: Any
) -> Any:
    """Loads a folder with diffusers alone (`dtype` None: float32); `kw` goes to `from_pretrained`.

    Only a processor that transformers cannot build without torchvision is put together here and handed in.
    """
    import diffusers

    folder = Path(folder)
    cls = getattr(diffusers, pipeline_class or "DiffusionPipeline")
    parts = {**_processors(folder), **kw}
    return cls.from_pretrained(str(folder), **{_dtype_argument(): as_dtype(dtype or "float32")}, **parts)


def _dtype_argument() -> str:
    """diffusers renamed the argument; the old name warns in the versions that know the new one."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a torch dtype by name, or itself."""
    import torch

    from shardit.errors import InputError

    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"{dtype!r} is not a floating point dtype: try float32, bfloat16 or float16")
    return found


def _processors(folder: Path) -> dict[str, Any]:
    from shardit.models.processor import build_processor, is_needed

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = {key: value[1] for key, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {key: build_processor(folder / key, cls) for key, cls in named.items() if is_needed(cls or "")}
