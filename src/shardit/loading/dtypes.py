"""Names of number formats in user settings and in safetensors files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError

if TYPE_CHECKING:
    import torch

_USER = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}

Setting = str | dict[str, str] | None
"""One dtype for all components, or a dict from component name to dtype, as picklable plain text; see `setting`."""

OTHERS = "default"
"""The key for components without an entry of their own, as in diffusers; without this key they use float32."""

# safetensors code -> (torch attribute, bits per element)
_FILE = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U8": ("uint8", 8),
    "U16": ("uint16", 16),
    "U32": ("uint32", 32),
    "U64": ("uint64", 64),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F4": (None, 4),
    "F6_E2M3": (None, 6),
    "F6_E3M2": (None, 6),
}


def as_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype for "float32", "bfloat16", "float16" or a dtype; None (the choice of diffusers) stays
    None.

    Raises InputError for anything else; float8 is not a compute dtype.
    """
    import torch

    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name in _USER:
        return getattr(torch, _USER[name])
    if value is torch.float64 or name == "float64":  # for comparisons against exact arithmetic
        return torch.float64
    raise _unknown("dtype", name)


def setting(value: Any, name: str = "dtype") -> Setting:
    """Normalize the dtype setting of a user without importing torch: a name, a torch dtype, a dict of these by
    component, or text such as "transformer=bfloat16,vae=float32". None stays None. Raises InputError that names
    `name`."""
    if value is None:
        return None
    if isinstance(value, str) and "=" in value:
        value = _by_component(value, name)
    if not isinstance(value, Mapping):
        return _known(value, name)
    if not value or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} must name components, as in {{'transformer': 'bfloat16', 'vae': 'float32'}}")
    return {key: _known(one, f"{name}[{key!r}]") for key, one in value.items()}


def check_components(chosen: Setting, known: Collection[str]) -> None:
    """Raise InputError if a dtype is given for a component that the pipeline does not have; `known`: components with
    weights."""
    for name in chosen if isinstance(chosen, dict) else ():
        if name not in known and name != OTHERS:
            listed = ", ".join([*known, OTHERS])
            raise InputError(f"dtype: this pipeline has no component {name!r} with weights; it has {listed}")


def dtype_of(chosen: Setting, component: str) -> torch.dtype | None:
    """Return the dtype of one component, as from_pretrained reads `torch_dtype`."""
    if isinstance(chosen, dict):
        return as_dtype(chosen.get(component, chosen.get(OTHERS, "float32")))
    return as_dtype(chosen)


def _by_component(text: str, name: str) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for part in text.split(","):
        component, _, kind = part.strip().partition("=")
        if not component or not kind or component in chosen:
            example = "transformer=bfloat16,vae=float32"
            raise InputError(f"{name} must be as in bfloat16 or {example}, each component once, got {text!r}")
        chosen[component] = kind
    return chosen


def _unknown(name: str, written: str) -> InputError:
    return InputError(f"{name} {written!r} is not known: use float32, bfloat16, float16 or float64")


def _known(value: Any, name: str) -> str:
    written = str(value).removeprefix("torch.")
    if written not in _USER and written != "float64":
        raise _unknown(name, written)
    return _USER.get(written, written)


def file_bits(code: str) -> int | None:
    """Return the bits per element of a safetensors code, None for an unknown code."""
    known = _FILE.get(code)
    return known[1] if known else None


def file_dtype(code: str) -> torch.dtype | None:
    """Return the torch dtype of a safetensors code, None if torch has none."""
    import torch

    name = _FILE.get(code, (None, 0))[0]
    return getattr(torch, name, None) if name else None
