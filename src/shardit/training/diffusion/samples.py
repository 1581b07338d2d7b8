"""Samples while training: the pipeline with the trained modules in place, over all stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from shardit.core.comm.group import GroupCoordinator
from shardit.diffusion.output.encode import write_image, write_video
from shardit.diffusion.request.returned import IMAGES, VIDEO
from shardit.errors import InputError, first_line
from shardit.training.diffusion.files import on_first

FPS = 16.0
"""Default frames per second of a sample."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a sample. embeddings: what `encode_prompt` returned in the pipeline's call, one for each time that it
    was called; None if the text encoders are there all the time."""

    text: str
    arguments: dict[str, Any]
    embeddings: list[Any] | None = None


class _Encoded(Exception):
    """The pipeline has encoded its prompts."""


def encode(pipe: Any, text: str, arguments: Mapping[str, Any]) -> Prompt:
    """Run a pipeline's call as far as its prompts are encoded, while its encoders are there."""
    made: list[Any] = []
    own = pipe.encode_prompt

    def recorded(*args: Any, **kwargs: Any) -> Any:
        made.append(own(*args, **kwargs))
        return made[-1]

    def stop(*_: Any, **__: Any) -> None:
        raise _Encoded

    with _replaced(pipe, encode_prompt=recorded, prepare_latents=stop):
        try:
            pipe(prompt=text, **arguments)
        except _Encoded:
            pass
        except (ValueError, TypeError) as error:
            raise InputError(f"the sample {text!r} cannot be made: {first_line(error)}") from error
    return Prompt(text, dict(arguments), tree_map(_to("cpu"), made))


@contextmanager
def _replaced(pipe: Any, **others: Any) -> Iterator[None]:
    """Give one pipeline other methods or modules for a while."""
    before = {name: pipe.__dict__[name] for name in others if name in pipe.__dict__}
    pipe.__dict__.update(others)
    try:
        yield
    finally:
        for name in others:
            pipe.__dict__.pop(name, None)
        pipe.__dict__.update(before)


def _to(device: Any) -> Any:
    return lambda value: value.to(device) if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class Sampler:
    """Makes the samples of a run. pipe: the pipeline with the trained modules and the VAE."""

    pipe: Any
    prompts: Sequence[Prompt]
    seed: int
    fps: float | None
    device: torch.device
    ranks: GroupCoordinator

    def __call__(self, models: Mapping[str, nn.Module], folder: Path) -> list[Path]:
        """Write the samples and return their files. Collective."""
        files: list[Path] = []
        for number, prompt in enumerate(self.prompts):
            made = self._one(models, number, prompt)
            files.append(self._write(made, folder / f"{number}", prompt.text, self.seed + number))
        return files

    def _one(self, models: Mapping[str, nn.Module], number: int, prompt: Prompt) -> Any:
        embeddings = tree_map(_to(self.device), prompt.embeddings)
        generator = torch.Generator("cpu").manual_seed(self.seed + number)
        own = {} if embeddings is None else {"encode_prompt": lambda *_, **__: embeddings.pop(0)}
        with _replaced(self.pipe, **models, **own):
            return self.pipe(prompt=prompt.text, generator=generator, output_type="pil", **prompt.arguments)

    def _write(self, made: Any, path: Path, prompt: str, seed: int) -> Path:
        """Write one sample on the first rank. Raises InputError on all ranks if it cannot be written."""
        frames = next((made[name] for name in VIDEO if name in made), None)
        target = path.with_suffix(".mp4" if frames is not None else ".png")
        record = {"prompt": prompt, "seed": seed}

        def write() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            if frames is not None:
                write_video(frames[0], target, self.fps or FPS, record)
            else:
                write_image(next(made[name] for name in IMAGES if name in made)[0], target, record)

        on_first(self.ranks, target, write)
        return target
