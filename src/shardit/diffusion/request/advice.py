"""What a user can change where the error of a library does not say so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardit.diffusion.request.request import Request

_OF_DTYPES = re.compile(r"bfloat16|\bhalf\b|float16|same dtype|scalar type", re.IGNORECASE)
_OF_SIZES = re.compile(r"kernel size|output size is too small|padding size should be less", re.IGNORECASE)
_OF_SHAPES = (RuntimeError, IndexError, ZeroDivisionError)
"""What torch and Python raise of tensors without elements, in many words; classes of their own say what is wrong."""
_SMALL = 64
"""Pixels of a side of which few latents are left, whatever the model is."""


def advice(request: Request, error: Exception) -> str:
    """What to add to the text of an error that a pipeline has raised; "" where nothing is known."""
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
