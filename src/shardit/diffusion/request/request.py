"""One pipeline call, as plain data that every rank turns into the same call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from PIL.Image import Image


@dataclass(frozen=True)
class Request:
    """One pipeline call, as picklable data."""

    index: int
    """Position in the list that `Omni.generate` returns."""
    pipeline: str
    """Name of the pipeline class to run."""
    prompt: str | None
    """The prompt; None if embeddings were given or the pipeline takes none."""
    kwargs: Mapping[str, Any]
    """Chosen arguments of the pipeline's `__call__`, apart from prompt, images, number of outputs and generator."""
    images: Sequence[Image]
    """Input images, upright, 8-bit, in the mode of the pipeline."""
    image_name: str | None
    """Argument for the images, or None."""
    seed: int
    """Seed of a torch CPU generator."""
    num_outputs: int
    """Requested images or videos."""
    count_name: str | None
    """Argument for the number of outputs, or None."""
    fps: float
    """Frames per second of a saved video."""
    sample_rate: int | None = None
    """Samples per second of saved sound, if the model defines it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of the pipeline's arguments that were not chosen."""
    made_by: Mapping[str, Any] = field(default_factory=dict)
    """See `PipelineSignature.made_by`."""
    images_left_out: Sequence[str] = ()
    """Arguments for images and videos that the pipeline takes and that were not given."""

    def call_arguments(self) -> dict[str, Any]:
        """Return all arguments of the pipeline's `__call__` except the generator."""
        arguments = dict(self.kwargs)
        if self.prompt is not None:
            arguments["prompt"] = self.prompt
        if self.images and self.image_name:
            # Some pipelines take a list of one for a batch, so one image is passed as itself.
            arguments[self.image_name] = self.images[0] if len(self.images) == 1 else list(self.images)
        if self.count_name:
            arguments[self.count_name] = self.num_outputs
        return arguments

    def settings(self) -> dict[str, Any]:
        """Return the record for an output file: the pipeline, its model and its arguments with their defaults, as JSON
        values."""
        values = {**self.defaults, **self.kwargs}
        chosen = {name: _as_json(value) for name, value in values.items() if (name, value) != ("output_type", "pil")}
        sizes = [list(image.size) for image in self.images]
        return {
            "pipeline": self.pipeline,
            **self.made_by,
            **chosen,
            "num_outputs_per_prompt": self.num_outputs,
            **({"input_image_sizes": sizes} if sizes else {}),
        }


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Integral):  # of numpy
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Image):
        return f"picture {value.width}x{value.height}"
    if isinstance(value, (list, tuple)) and value and all(isinstance(entry, Image) for entry in value):
        return f"{len(value)} pictures {value[0].width}x{value[0].height}"
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if hasattr(value, "shape"):  # a tensor or array: its numbers do not belong in a file's metadata
        return f"{type(value).__name__}{tuple(value.shape)}"
    return str(value)
