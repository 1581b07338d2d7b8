"""Converts the return value of a pipeline to an `Output`: finds images, videos, sound and text among the fields, and
keeps the rest unchanged."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image

from shardit.diffusion.loading.required_packages import named_in
from shardit.diffusion.output.arrays import array_of
from shardit.diffusion.output.output import Output
from shardit.diffusion.request.advice import advice
from shardit.diffusion.request.returned import IMAGES, SOUND, TEXT, VIDEO
from shardit.errors import InputError
from shardit.loading.missing_packages import pip_line

if TYPE_CHECKING:
    from shardit.diffusion.request.request import Request


NOT_NUMBERS = (
    "the result has values that are not numbers (NaN), which show as black: use dtype float32 for the VAE, or less "
    "guidance"
)
"""A note."""


def collect(request: Request, value: tuple[Any, float, list[str]] | None, error: str | None) -> Output:
    """Build the output of a finished request from its result or its error.

    Never raises for any return value of a pipeline: this runs on one rank, and the others would wait for it.
    """
    common: dict[str, Any] = {
        "prompt": request.prompt,
        "seed": request.seed,
        "fps": request.fps,
        "settings": request.settings(),
    }
    if value is None:
        return Output(error=error, **common)
    result, seconds, warnings = value
    try:
        made, left_out = _read(result, request)
    except Exception as problem:
        return Output(error=f"{request.pipeline} returned what cannot be read: {one_line(problem)}", **common)
    warnings = list(dict.fromkeys([*warnings, *left_out, *([NOT_NUMBERS] if _has_nan(fields_of(result)) else [])]))
    metrics = {"warnings": warnings} if warnings else {}
    return Output(seconds=seconds, metrics=metrics, **made, **common)


def _has_nan(value: Any) -> bool:
    """Return whether a float tensor or array in nested containers has a NaN."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and value.numel() > 0 and bool(value.amin().isnan())
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "f" and value.size > 0 and bool(np.isnan(value.min()))
    nested = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_has_nan, nested))


def with_arrays(output: Output) -> Output:
    """Return the same output with arrays instead of tensors (bfloat16 as float32), for a process without torch."""
    return dataclasses.replace(
        output, latents=_arrays(output.latents), audio=_arrays(output.audio), extra=_arrays(output.extra)
    )


def _arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return array_of(value)
    if isinstance(value, Mapping):
        return {name: _arrays(each) for name, each in value.items()}
    return [_arrays(each) for each in value] if isinstance(value, (list, tuple)) else value


def _read(result: Any, request: Request) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the Output, and the names of values that could not be included."""
    fields = {name: value for name, value in fields_of(result).items() if value is not None}
    if not fields:
        raise InputError("nothing; check its arguments")
    made: dict[str, Any] = {}
    name = next((name for name in (*VIDEO, *IMAGES) if name in fields), None)
    name = name or next((name for name, value in fields.items() if _images(value)), None)
    if name is not None:
        made.update(_shown(name, fields.pop(name)))
    latent = request.kwargs.get("output_type") == "latent"
    extra, left_out = made.pop("extra", {}), []
    for name, value in fields.items():
        sound = _waveforms(value, request.num_outputs) if name in SOUND and not latent else None
        if sound is not None and "audio" not in made:
            made.update(audio=sound, sample_rate=request.sample_rate)
        elif name in TEXT and "texts" not in made and (texts := _strings(value)):
            made["texts"] = texts
        else:
            extra[name] = _portable(value, name, left_out)
    made["extra"] = {name: value for name, value in extra.items() if value is not _LEFT_OUT}
    if isinstance(made.get("latents"), (list, dict)):
        made["latents"] = _portable(made["latents"], "latents", left_out)
    return made, left_out


def fields_of(result: Any) -> dict[str, Any]:
    """Return the fields of a pipeline's result by name; unnamed values are called "output", "output_0", "output_1",
    ..."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if isinstance(result, tuple):
        names: Iterable[str] = getattr(result, "_fields", None) or (f"output_{i}" for i in range(len(result)))
        return dict(zip(names, result, strict=True))
    if isinstance(result, (torch.Tensor, np.ndarray, Image, str, list, int, float)):
        return {"text" if isinstance(result, str) else "output": result}
    return dict(vars(result))


def _shown(name: str, made: Any) -> dict[str, Any]:
    """Return the fields of the Output for a pipeline's images or videos; numbers count as latents."""
    groups = _images(made)
    if groups is None:
        return {"latents": _plain(made)} if _is_numeric(made) else {"extra": {name: _portable(made, name, [])}}
    if name in VIDEO:
        # One list of images is one video.
        flat = isinstance(made, list) and all(isinstance(entry, Image) for entry in made)
        return {"frames": [made] if flat else groups}
    return {"images": [image for group in groups for image in group]}


def _images(made: Any) -> list[list[Image]] | None:
    """Return images as a list of lists, or None if the value is something else."""
    entries = made if isinstance(made, (list, tuple)) else [made]
    groups = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in entries]
    flat = [image for group in groups for image in group]
    return groups if flat and all(isinstance(image, Image) for image in flat) else None


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_numeric(entry) for entry in value)
    return isinstance(value, (torch.Tensor, np.ndarray))


def _plain(value: Any) -> Any:
    """Move numbers to CPU memory of their own, to be sent to another process."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # A view would be sent with its whole storage.
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _waveforms(value: Any, outputs: int) -> torch.Tensor | None:
    """Convert sound to float32 of shape (outputs, channels, samples); return None if it has no such form."""
    if isinstance(value, (list, tuple)) and _is_numeric(value):
        parts = [torch.as_tensor(part) for part in value]
        if len({part.shape for part in parts}) > 1:
            return None
        value = torch.stack(parts)
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        return None
    sound = torch.as_tensor(value).detach().cpu()
    if not sound.is_floating_point() or not 1 <= sound.ndim <= 3:
        return None
    if sound.ndim == 1:
        sound = sound[None, None]
    elif sound.ndim == 2:  # one channel for each output, or the channels of the only one
        sound = sound[:, None] if len(sound) == outputs else sound[None]
    return sound.to(torch.float32).contiguous()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)):
        parts = [_strings(entry) for entry in value]
        return [text for part in parts for text in part] if all(parts) else []
    return []


_LEFT_OUT: Any = object()


def _portable(value: Any, name: str, left_out: list[str]) -> Any:
    """Convert a value to types that any process can load: tensors, arrays, images, numbers, text, and lists and dicts
    of these. Names of other values are added to `left_out`."""
    if value is None or isinstance(value, (bool, int, float, str, Image)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _plain(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
        parts = {key: _portable(each, f"{name}.{key}", left_out) for key, each in fields_of(value).items()}
        return {key: part for key, part in parts.items() if part is not _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        listed = [_portable(each, f"{name}.{position}", left_out) for position, each in enumerate(value)]
        return [part for part in listed if part is not _LEFT_OUT]
    left_out.append(f"{name}, a {type(value).__name__}, cannot be sent and was left out of the output")
    return _LEFT_OUT


def error_text(request: Request, error: Exception) -> str:
    """Return an error of a request in one line, with the remedy if it is known."""
    return one_line(error) + advice(request, error)


def one_line(error: Exception) -> str:
    """Return an exception as one line: our own texts unchanged, others with their class and origin."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, (ImportError, NameError)) and (lacking := named_in(text)):
        text = f"{text}; {pip_line(lacking)}"
    last = traceback.extract_tb(error.__traceback__)
    where = f" ({last[-1].name}, line {last[-1].lineno})" if last else ""
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, ValueError) else f"{type(error).__name__}: {text}{where}"
    )
