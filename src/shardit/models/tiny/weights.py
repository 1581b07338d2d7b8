"""Deterministic weights: every tensor comes from its own counter-based stream, keyed by its full name.

The numbers are uniform draws of numpy's Philox generator, scaled: exact arithmetic, so the same on every machine,
and neither torch's nor numpy's global generator is touched. Nothing stays at zero (gates, modulation tables, output
projections): each block must matter for the result.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

# First match wins: pattern on the parameter's name, centre, spread (a number, or "fan": 1 / sqrt(inputs) times gain).
_RULES: tuple[tuple[str, float, float | str, float], ...] = (
    (r"scale_shift_table$|modulation$", 0.0, 0.3, 1.0),
    (r"pad_token$", 0.0, 1.0, 1.0),
    (r"gamma$", 1.0, 0.1, 1.0),
    (r"relative_attention_bias\.weight$", 0.0, 1.0, 1.0),
    (r"(embed_tokens|shared|token_embedding|addition_t_embedding)\.weight$", 0.0, 1.0, 1.0),
    (r"position_embedding\.weight$", 0.0, 0.3, 1.0),
    (r"(norm\w*\.linear|norm_out\.linear|_mod\.1|adaLN_modulation\.\d|time_proj)\.weight$", 0.0, "fan", 1.6),
    # Sharper attention than at 1: far tokens (text, input images) must matter, and so must their positions.
    (r"norm_(added_)?[qk]\.weight$", 1.5, 0.1, 1.0),
    # Autoencoders: an image must get through many small convolutions, and the result must not be clipped.
    (r"^encoder\.(conv_in|down_blocks\..*resample\.1)\.weight$", 0.0, "fan", 2.0),
    (r"^(encoder\.conv_out|quant_conv)\.weight$", 0.0, "fan", 2.0),
    (r"^encoder\..*bias$", 0.0, 0.02, 1.0),
    (r"^decoder\.conv_out\.weight$", 0.0, "fan", 0.8),
    # Their norms divide by the length of a few channels: keep that away from zero, or rounding errors explode.
    (r"^decoder\.up_blocks\..*resample\.1\.bias$", 0.5, 0.1, 1.0),
)


def fill(model: torch.nn.Module, key: str) -> None:
    """Sets every parameter of `model` from streams keyed by `key` and the parameter's name."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = _values(f"{key}/{name}", name, tuple(parameter.shape))
            parameter.copy_(torch.as_tensor(values))


def read(model: torch.nn.Module, file: Path, component: str) -> None:
    """Sets every tensor of `model` to that of a file with the names COMPONENT.NAME."""
    from safetensors import safe_open

    prefix = f"{component}."
    with safe_open(str(file), "pt") as tensors:
        model.load_state_dict(
            {name[len(prefix) :]: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
        )


def _values(key: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    centre, spread = _distribution(name, shape)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    draws = np.random.Generator(np.random.Philox(key=seed)).random(shape, dtype=np.float64)
    # A uniform draw on [0, 1) has the standard deviation 1 / sqrt(12).
    return (centre + (draws - 0.5) * (spread * 12**0.5)).astype(np.float32)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and standard deviation of a parameter."""
    for pattern, centre, spread, gain in _RULES:
        if re.search(pattern, name):
            return centre, _fan(shape, gain) if spread == "fan" else float(spread)
    if len(shape) >= 2:
        return 0.0, _fan(shape, 1.0)
    return (0.0, 0.1) if name.endswith("bias") else (1.0, 0.1)


def _fan(shape: tuple[int, ...], gain: float) -> float:
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    return gain / max(inputs, 1) ** 0.5  # a table may have no columns
