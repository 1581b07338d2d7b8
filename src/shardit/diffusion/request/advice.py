"""Advice for users on errors of libraries that contain none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardit.diffusion.request.request import Request

_OF_DTYPES = re.compile(r"bfloat16|\bhalf\b|float16|same dtype|scalar type", re.IGNORECASE)
_OF_SIZES = re.compile(r"kernel size|output size is too small|padding size should be less", re.IGNORECASE)
_OF_SHAPES = (RuntimeError, IndexError, ZeroDivisionError)
"""Errors of torch and Python for tensors without elements, in many words; custom classes have clear messages."""
_SMALL = 64
"""Side in pixels with few latents in any model."""


def advice(request: Request, error: Exception) -> str:
    """Return the advice to add to the text of a pipeline's error; "" if there is none."""
    text = str(error)
    dtype = request.made_by.get("dtype")
    if isinstance(dtype, dict) and _OF_DTYPES.search(text):
        given = ",".join(f"{component}={name}" for component, name in dtype.items())
        return (
            f"; the components have dtypes of their own ({given}), with which this pipeline does not run: give others"
        )
    sides = {name: request.kwargs[name] for name in ("height", "width") if name in request.kwargs}
    small = type(error) in _OF_SHAPES and any(isinstance(side, int) and side < _SMALL for side in sides.values())
    if sides and (small or _OF_SIZES.search(text)):
        given = ", ".join(f"{name} {value}" for name, value in sides.items())
        return f"; perhaps the result is too small for the model ({given}): ask for a larger one"
    return ""
