"""Advice for users on errors of libraries that contain none."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from shardit.settings.checks import float_of

if TYPE_CHECKING:
    from shardit.diffusion.request.request import Request

_OF_DTYPES = re.compile(r"bfloat16|\bhalf\b|float16|same dtype|scalar type", re.IGNORECASE)
_OF_SIZES = re.compile(r"kernel size|output size is too small|padding size should be less", re.IGNORECASE)
_OF_NUMBERS = re.compile(r"without overflow|too large to convert", re.IGNORECASE)
_OF_ZERO = re.compile(
    r"by zero|\bsizes? 0\b|\b0 elements|numel\(\) == 0|non-?(zero|empty)|than 0\b|: 0\b|negative dim|[\[( ]0[,\])]"
)
"""Words of errors for tensors without elements."""
_OF_RATIO = re.compile(r"aspect ratio|must be > 0")
"""Words of errors for sizes that are computed from those of an image."""
_OF_SHAPES = (RuntimeError, IndexError, ZeroDivisionError)
"""Errors of torch and Python for such tensors; custom classes have clear messages."""
_OF_ARGUMENTS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError)
"""Errors for a tensor of the wrong shape, which seldom name the argument."""
_LARGE = 1e4
"""Numbers near and above the largest of float16."""
_OF_NOTHING = re.compile(r"None|incorrect format|must be passed|to be provided|cannot be undefined")
"""Words of errors of libraries for arguments that are missing."""
_SMALL = 64
"""Side in pixels with few latents in any model."""


def advice(request: Request, error: Exception) -> str:
    """Return what to add to the text of a pipeline's error: advice, and shapes of given tensors; "" if there is
    none."""
    return (_narrow(request, error) or _remedy(request, error)) + _images(request, error) + _tensors(request, error)


def _narrow(request: Request, error: Exception) -> str:
    """Return an input image that leaves nothing of a size computed from its own, if the error may come of that."""
    sizes = [one.size for one in request.images if min(one.size) < max(_SMALL / 4, max(one.size) / 100)]
    text = str(error)
    if not sizes or not any(words.search(text) for words in (_OF_ZERO, _OF_SIZES, _OF_RATIO)):
        return ""
    width, height = min(sizes, key=min)
    return f"; perhaps {request.image_name} is too small or too narrow ({width}x{height}): give another image"


def _images(request: Request, error: Exception) -> str:
    """Return the arguments for images and videos that were not given, if the error may come of a missing one: it
    concerns nothing, inputs or one of them."""
    text, names = str(error), request.images_left_out
    of_another = any(f"`{name}`" in text for name in request.kwargs)
    nothing = _OF_NOTHING.search(text) and not of_another
    named = nothing or any(re.search(rf"\b{name}\b", text) for name in names)
    if not names or not named or type(error) not in _OF_ARGUMENTS:
        return ""
    return f"; not given: {', '.join(names)}: the pipeline may need an image or a video there"


def _tensors(request: Request, error: Exception) -> str:
    """Return the shapes of the tensors that the user gave, as one of them may be the cause."""
    if type(error) not in _OF_ARGUMENTS:
        return ""
    shapes = {name: _shape(value) for name, value in request.kwargs.items()}
    given = ", ".join(f"{name} {shape}" for name, shape in shapes.items() if shape)
    return given and f"; given: {given}"


def _shape(value: Any) -> str:
    """Return the shape of a tensor or an array, or of a list of them; "" for other values."""
    if isinstance(value, (list, tuple)):
        shapes = [_shape(each) for each in value]
        return f"[{', '.join(shapes)}]" if shapes and all(shapes) else ""
    return str(tuple(value.shape)) if hasattr(value, "shape") else ""


def _remedy(request: Request, error: Exception) -> str:
    text = str(error)
    dtype = request.made_by.get("dtype")
    if isinstance(dtype, dict) and _OF_DTYPES.search(text):
        given = ",".join(f"{component}={name}" for component, name in dtype.items())
        return (
            f"; the components have dtypes of their own ({given}), with which this pipeline does not run: give others"
        )
    if _OF_NUMBERS.search(text):
        large = {name: v for name, v in request.kwargs.items() if isinstance(v, Real) and abs(float_of(v)) > _LARGE}
        given = ", ".join(f"{name} {value}" for name, value in large.items())
        return f"; a number is too large for the dtype of the model ({given}): give a smaller one" if given else ""
    sides = {name: request.kwargs[name] for name in ("height", "width") if name in request.kwargs}
    few = any(isinstance(side, Integral) and int(side) < _SMALL for side in sides.values())
    small = _OF_SIZES.search(text) or (few and type(error) in _OF_SHAPES and _OF_ZERO.search(text))
    if sides and small and not any(map(_shape, request.kwargs.values())):  # tensors of the user are the likelier cause
        given = ", ".join(f"{name} {value}" for name, value in sides.items())
        return f"; perhaps the result is too small for the model ({given}): ask for a larger one"
    return ""
