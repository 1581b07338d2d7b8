"""From what a pipeline returns to an `Output`."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from ..errors import InputError
from ..output import Output

if TYPE_CHECKING:
    from ..requests import Request


def collect(request: Request, value: tuple[Any, float, list[str]] | None, error: Exception | None) -> Output:
    """The output of a request that has ended, with its result or its error."""
    common: dict[str, Any] = {
        "prompt": request.prompt,
        "seed": request.seed,
        "fps": request.fps,
        "settings": request.settings(),
    }
    if value is None:
        assert error is not None
        return Output(error=one_line(error), **common)
    result, seconds, warnings = value
    images, frames, latents = _pictures(result)
    metrics = {"warnings": warnings} if warnings else {}
    return Output(images=images, frames=frames, latents=latents, seconds=seconds, metrics=metrics, **common)


def _pictures(result: Any) -> tuple[list[Any], list[list[Any]] | None, Any]:
    """(pictures, videos, latents) of a pipeline's result; what is not PIL counts as latents."""
    frames = getattr(result, "frames", None)
    made = frames if frames is not None else result.images
    entries = made if isinstance(made, list) else [made]
    groups = [entry if isinstance(entry, list) else [entry] for entry in entries]
    if not all(isinstance(picture, Image) for group in groups for picture in group):
        return [], None, made
    return ([], groups, None) if frames is not None else ([p for group in groups for p in group], None, None)


def one_line(error: Exception) -> str:
    """An exception as one line: our own texts as they are, others with their class and the place they come from."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    last = traceback.extract_tb(error.__traceback__)
    where = f" ({last[-1].name}, line {last[-1].lineno})" if last else ""
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, ValueError) else f"{type(error).__name__}: {text}{where}"
    )
