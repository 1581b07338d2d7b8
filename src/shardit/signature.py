"""What a pipeline class takes, as data that can be sent between processes and needs no diffusers to be read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Set by shardit itself, so not among what a user can choose.
_NOT_CHOICES = (
    "generator",
    "return_dict",
    "callback",
    "callback_steps",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "image",
)
_COUNT_NAMES = ("num_images_per_prompt", "num_videos_per_prompt")
# Most pipelines declare `image=None` and fail later without one; the names of their classes tell.
_WORDS_OF_IMAGE_PIPELINES = ("Edit", "Img2Img", "Inpaint", "ImageToVideo", "Layered", "Upscale", "Fill", "Pix2Pix")
# Given several pictures for one prompt, these would take them for a batch. Classes that are not named may have a use
# for several, and get them.
_CLASSES_OF_ONE_IMAGE = ("QwenImageEditPipeline", "QwenImageLayeredPipeline", "LongCatImageEditPipeline")


@dataclass(frozen=True)
class PipelineSignature:
    """The arguments of one pipeline class and what follows from them."""

    class_name: str
    """Name of the pipeline class."""
    names: tuple[str, ...]
    """Arguments of `__call__`, in order, without self."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that are plain values (None, bool, number, string)."""
    required: tuple[str, ...] = ()
    """Arguments without a default."""
    native_fps: float | None = None
    """Frames per second that the checkpoint was trained for, where its configuration tells."""

    @property
    def kind(self) -> Literal["image", "video"]:
        """What the pipeline makes."""
        return "video" if "num_frames" in self.names or "num_videos_per_prompt" in self.names else "image"

    @property
    def choices(self) -> list[str]:
        """What a user can give, under the names that shardit takes."""
        chosen = [name for name in self.names if name not in _NOT_CHOICES]
        chosen += ["pil_image"] if self.image_name else []
        chosen += ["num_outputs_per_prompt"] if self.count_name else []
        chosen += ["fps"] if self.kind == "video" else []
        return [*chosen, "seed"]

    @property
    def count_name(self) -> str | None:
        """The argument that takes the number of outputs, or None."""
        return next((name for name in _COUNT_NAMES if name in self.names), None)

    @property
    def rate_name(self) -> str | None:
        """The argument through which the model is told the frame rate, or None."""
        return "frame_rate" if "frame_rate" in self.names else None

    @property
    def image_name(self) -> str | None:
        """The argument that takes the input pictures, or None."""
        return "image" if "image" in self.names else None

    @property
    def image_mode(self) -> Literal["RGB", "RGBA"]:
        """Colour mode of input pictures: layered pipelines work on transparency."""
        return "RGBA" if "Layered" in self.class_name else "RGB"

    @property
    def needs_image(self) -> bool:
        """Whether the pipeline cannot run without an input picture."""
        by_name = any(word in self.class_name for word in _WORDS_OF_IMAGE_PIPELINES)
        return "image" in self.required or (self.image_name is not None and by_name)

    @property
    def one_image(self) -> bool:
        """Whether several input pictures for one prompt are a mistake."""
        return self.class_name in _CLASSES_OF_ONE_IMAGE or "ImageToVideo" in self.class_name

    @property
    def default_fps(self) -> float:
        """Frames per second where the user gives none: the model's own, else 16 for Wan and 24 for others."""
        told = self.native_fps or self.defaults.get(self.rate_name or "")
        return float(told) if told else (16.0 if self.class_name.startswith("Wan") else 24.0)


def signature_of(pipeline_class: type, model_index: Mapping[str, Any] | None = None) -> PipelineSignature:
    """Read the signature of any class with `__call__`.

    `model_index` is the content of the checkpoint's model_index.json; with it Wan2.2-TI2V (24 frames per second) is
    told from the other Wans (16), which have the same pipeline class.
    """
    is_module = any(base.__module__ == "torch.nn.modules.module" for base in pipeline_class.__mro__)
    method = "forward" if is_module else "__call__"
    own = (inspect.signature(vars(base)[method]) for base in pipeline_class.__mro__ if method in vars(base))
    return signature_from(pipeline_class.__name__, (list(call.parameters.values()) for call in own), model_index)


def signature_from(
    class_name: str, calls: Iterable[Sequence[inspect.Parameter]], model_index: Mapping[str, Any] | None = None
) -> PipelineSignature:
    """The signature of a class whose `__call__` takes the first of `calls`, with self; the next is the one that it
    overrides, and so on.

    Where it also has **kwargs, the named parameters of the next count too: it may pass names on. Any other name in
    **kwargs is dropped without a word by most pipelines, so it does not count.
    """
    found: dict[str, inspect.Parameter] = {}
    for parameters in calls:
        for item in parameters[1:]:
            if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
                found.setdefault(item.name, item)
        if all(item.kind is not item.VAR_KEYWORD for item in parameters):
            break
    simple = (type(None), bool, int, float, str)
    return PipelineSignature(
        class_name=class_name,
        names=tuple(found),
        defaults={item.name: item.default for item in found.values() if isinstance(item.default, simple)},
        required=tuple(item.name for item in found.values() if item.default is item.empty),
        native_fps=24.0 if (model_index or {}).get("expand_timesteps") else None,
    )
