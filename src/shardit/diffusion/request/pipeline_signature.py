"""The signature of a pipeline class, as data that can be sent between processes and used without diffusers."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from shardit.diffusion.loading.annotations import forms_of, is_list, is_tensor, tuple_length
from shardit.diffusion.request.returned import IMAGES, MAPS, VIDEO, Kind, declared_fields, kinds_of

# Set by shardit itself, so not a choice of the user.
_NOT_CHOICES = (
    "generator",
    "return_dict",
    "callback",
    "callback_steps",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "image",
)
_COUNT = re.compile(r"num_[a-z]+_per_prompt")
_RATE = re.compile(r"([a-z]+_)?(fps|frame_rate)")
_FRAMES = ("num_frames", "frames", "video_length")
"""Names of the number of frames of a video in pipelines."""
_PICTURE = re.compile(r"(^|_)(images?|masks?|videos?|conditioning_frames)$")
_IMAGE = re.compile(r"(^|_)images?$")
_EMBEDDED = re.compile("latents|embeds")
_NO_PICTURE = re.compile("prompt|embeds|latents|attention|padding|size")  # tensors, numbers
# Most pipelines declare `image=None` and fail later without one; the names of their classes show it.
_WORDS_OF_IMAGE_PIPELINES = (
    *("Edit", "Img2Img", "Inpaint", "ImageToVideo", "Layered", "Upscale", "Fill", "Pix2Pix", "Depth2Img"),
    *("SuperResolution", "ImageVariation", "ImageRefiner", "AdapterPipeline", "I2VGen", "CycleDiffusion"),
)
_EDIT_WITHOUT_IMAGE = ("BriaFiboEditPipeline", "JoyImageEditPipeline", "JoyImageEditPlusPipeline")
_CONTROLS = ("control_image", "control_video", "conditioning_frames", "image")
"""The argument for the condition of a ControlNet: the first of these that a pipeline has."""
_WORDS_OF_VIDEO_PIPELINES = ("VideoToVideo", "LatentUpsample")
_WORDS_OF_MASKS = ("Inpaint", "Fill")
_MASKS = ("mask_image", "control_mask")
# Given several images for one prompt, these would take them for a batch. Other classes may have a use for several,
# and get them.
_CLASSES_OF_ONE_IMAGE = ("QwenImageEditPipeline", "QwenImageLayeredPipeline", "LongCatImageEditPipeline")


@dataclass(frozen=True)
class PipelineSignature:
    """The arguments of one pipeline class and derived facts."""

    class_name: str
    """Name of the pipeline class."""
    names: tuple[str, ...]
    """Arguments of `__call__`, in order, without self."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that are plain values (None, bool, number, string)."""
    required: tuple[str, ...] = ()
    """Arguments without a default."""
    images: tuple[str, ...] = ()
    """Arguments besides `image` that are images or videos, by their names and annotations."""
    listed: tuple[str, ...] = ()
    """The arguments in `images` that are lists of images and nothing else, by their annotations."""
    tensors: tuple[str, ...] = ()
    """Arguments that are tensors and nothing else, by their annotations."""
    tuples: Mapping[str, int] = field(default_factory=dict)
    """Arguments that are tuples of numbers and nothing else, by their annotations, with their lengths; 0 is any."""
    text_lists: tuple[str, ...] = ()
    """Arguments that are lists of texts and nothing else, by their annotations."""
    number_keys: tuple[str, ...] = ()
    """Arguments that are dicts with whole numbers as keys, by their defaults; JSON has texts as keys only."""
    forms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Forms of values that arguments take, if their annotations have no others (`forms_of`)."""
    native_fps: float | None = None
    """Frames per second that the checkpoint was trained for, if its configuration has them."""
    multiples: Mapping[str, int] = field(default_factory=dict)
    """Required multiples of height and width, if the pipeline refuses others (`size_multiples`)."""
    least: Mapping[str, int] = field(default_factory=dict)
    """The least height and width that leave latents (`least_sides`)."""
    most: Mapping[str, int] = field(default_factory=dict)
    """The largest values of arguments above which the pipeline raises (`refused_above`)."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Arguments that no value of the loaded pipeline fits, and the errors for them (`refused_lists`)."""
    made_by: Mapping[str, Any] = field(default_factory=dict)
    """The model, its revision, number formats and versions of packages, as JSON values: recorded in files."""
    outputs: tuple[str, ...] = ()
    """Fields of the result of `__call__`; () if the class does not declare them."""
    sample_rate: int | None = None
    """Samples per second of the model's sound, if it makes sound and its configuration has the rate."""
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Missing packages that it needs; with each the arguments of which one must be given to need it, () if every call
    needs it."""

    lacks_adapter: bool = False
    """Whether it has arguments of an IP-Adapter, and no such adapter is loaded."""
    adapted: bool = False
    """Whether an IP-Adapter is loaded."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of results that the pipeline can make, the most significant first."""
        if self.outputs:
            # "pt" as its own default means numbers that are not to be viewed (an image prior, HDR).
            shown = not self._numbers or not {*VIDEO, *IMAGES} & set(self.outputs)
            return kinds_of(self.outputs) if shown else ("tensors",)
        return ("video",) if "num_frames" in self.names or "num_videos_per_prompt" in self.names else ("image",)

    @property
    def kind(self) -> Kind:
        """The main kind of result."""
        return self.kinds[0]

    def kinds_as(self, output_type: str | None) -> tuple[Kind, ...]:
        """Return the kinds that can be saved of a request with this `output_type`."""
        kinds: tuple[Kind, ...] = self.kinds
        if output_type in ("latent", "np", "pt"):  # numbers replace images, except for maps, which are made of them
            kinds = tuple(kind for kind in kinds if kind not in ("image", "video") or {*MAPS} & {*self.outputs})
        numbers: tuple[Kind, ...] = () if "tensors" in kinds else ("tensors",)
        return kinds + numbers

    @property
    def form(self) -> str | None:
        """The `output_type` for images, if the default would give numbers or latents."""
        default = self.defaults.get("output_type")
        shows = not self.outputs or {*VIDEO, *IMAGES} & set(self.outputs)
        return "pil" if "output_type" in self.names and shows and not self._numbers and default != "pil" else default

    @property
    def _numbers(self) -> bool:
        return self.defaults.get("output_type") == "pt"

    @property
    def choices(self) -> list[str]:
        """Names that a user can give, as shardit calls them."""
        chosen = [name for name in self.names if name not in _NOT_CHOICES and not is_count(name)]
        chosen = [name for name in chosen if not self.needs_adapter(name)]
        chosen += ["pil_image"] if self.image_name else []
        chosen += ["num_outputs_per_prompt"] if self.count_name else []
        chosen += ["num_frames"] if self.frames_name else []
        chosen += ["fps"] if self.rate_name or self.kind == "video" else []
        return list(dict.fromkeys([*chosen, "seed"]))

    def without(self, names: Collection[str]) -> PipelineSignature:
        """Return the signature without these arguments."""
        return dataclasses.replace(self, names=tuple(name for name in self.names if name not in names))

    def size_problem(self, name: str, value: Any) -> str | None:
        """Return the error in a height or width, with the nearest valid ones; None if it is valid."""
        step, least = self.multiples.get(name), self.least.get(name)
        if not isinstance(value, Integral):  # of numpy, too
            return None
        value = int(value)
        if least is not None and value < least and (step is None or value % step == 0):
            return f"{name} must be at least {least}, got {value}: the model can make nothing smaller"
        if step is None or value % step == 0:
            return None
        below, above = value // step * step, (value // step + 1) * step
        return f"{name} must be a multiple of {step}, got {value}; use {f'{below} or ' if below else ''}{above}"

    def limit_problem(self, name: str, value: Any) -> str | None:
        """Return the error in an argument that is refused, or a number that is too large; None if it is valid."""
        if name in self.refused and value is not None:
            return self.refused[name]
        most = self.most.get(name)
        if most is None or not isinstance(value, Integral) or int(value) <= most:
            return None
        return f"{name} must be at most {most}, got {value}"

    def needs_adapter(self, name: str) -> bool:
        """Return whether an argument is of an IP-Adapter that is not loaded."""
        return self.lacks_adapter and "ip_adapter_image" in name

    def tensor_problem(self, name: str, value: Any) -> str | None:
        """Return the error in an argument that must be a tensor: text and plain numbers are invalid, also in lists, and
        for latents and embeddings arrays."""
        parts = list(_leaves(value))
        wrong = not parts or any(isinstance(part, (str, bytes, bool, Real, Mapping)) for part in parts)
        wrong = wrong or (bool(_EMBEDDED.search(name)) and any(type(part).__module__ == "numpy" for part in parts))
        if name not in self.tensors or _IMAGE.search(name) or not wrong:  # images are opened in any case
            return None
        return f"{name} must be a tensor, got {repr(value)[:60]}; give one to shardit.Omni, or leave it out"

    @property
    def count_name(self) -> str | None:
        """The argument that takes the number of outputs, or None."""
        return next(filter(is_count, self.names), None)

    @property
    def rate_name(self) -> str | None:
        """The name of the frame-rate argument, or None."""
        return next(filter(_RATE.fullmatch, self.names), None)

    @property
    def frames_name(self) -> str | None:
        """The argument that takes the number of frames, or None."""
        return next((name for name in _FRAMES if name in self.names), None)

    @property
    def image_name(self) -> str | None:
        """The argument that takes the input images, or None."""
        return "image" if "image" in self.names else None

    @property
    def image_mode(self) -> Literal["RGB", "RGBA"]:
        """Colour mode of input images: layered pipelines use transparency."""
        return "RGBA" if "Layered" in self.class_name else "RGB"

    @property
    def needs_image(self) -> bool:
        """Whether the pipeline cannot run without an input image."""
        by_name = any(word in self.class_name for word in _WORDS_OF_IMAGE_PIPELINES)
        by_name = (by_name and self.class_name not in _EDIT_WITHOUT_IMAGE) or self._control_name == "image"
        return "image" in self.required or (self.image_name is not None and by_name)

    @property
    def mask_name(self) -> str | None:
        """The argument for the mask of an inpainting pipeline, which declares `mask_image=None` and fails later without
        one; None for other pipelines."""
        paints = any(word in self.class_name for word in _WORDS_OF_MASKS)
        return next((name for name in _MASKS if name in self.names), None) if paints else None

    @property
    def needed_images(self) -> tuple[str, ...]:
        """Images and videos besides `image` without which the pipeline cannot run."""
        required = tuple(name for name in self.required if name in self.images)
        video = "video" in self.names and any(word in self.class_name for word in _WORDS_OF_VIDEO_PIPELINES)
        others = (self.mask_name, self._control_name, "video" if video else None)
        return tuple(dict.fromkeys([*required, *(name for name in others if name not in (None, "image"))]))

    @property
    def _control_name(self) -> str | None:
        """The argument for the condition of a ControlNet or a control model; None for other pipelines."""
        controlled = "Control" in self.class_name
        return next((name for name in _CONTROLS if name in self.names), None) if controlled else None

    @property
    def one_image(self) -> bool:
        """Whether several input images for one prompt are a mistake."""
        return self.class_name in _CLASSES_OF_ONE_IMAGE or "ImageToVideo" in self.class_name

    @property
    def default_fps(self) -> float:
        """Frames per second if the user gives none: the model's own, else 16 for Wan and 24 for others."""
        rate = self.native_fps or self.defaults.get(self.rate_name or "")
        return float(rate) if rate else (16.0 if self.class_name.startswith("Wan") else 24.0)


def only_numbers(forms: Sequence[str]) -> bool:
    """Return whether an argument with values of these forms takes numbers and nothing else."""
    return bool(forms) and set(forms) <= {"number", "flag"}


def same_setting(one: str, other: str) -> bool:
    """Return whether two arguments are names of the same setting: the frame rate, or the number of frames."""
    return one == other or all(map(_RATE.fullmatch, (one, other))) or {one, other} <= {*_FRAMES}


def signature_of(
    pipeline_class: type, model_index: Mapping[str, Any] | None = None, *, sample_rate: int | None = None
) -> PipelineSignature:
    """Read the signature of any class with `__call__`.

    model_index: the content of the checkpoint's model_index.json; with it Wan2.2-TI2V (24 frames per second) is
    distinguished from the other Wans (16), which have the same pipeline class. sample_rate: the result of
    `sample_rate_of`.
    """
    is_module = any(base.__module__ == "torch.nn.modules.module" for base in pipeline_class.__mro__)
    method = "forward" if is_module else "__call__"
    own = (inspect.signature(vars(base)[method]) for base in pipeline_class.__mro__ if method in vars(base))
    found = signature_from(pipeline_class.__name__, (list(call.parameters.values()) for call in own), model_index)
    return dataclasses.replace(found, outputs=declared_fields(pipeline_class), sample_rate=sample_rate)


def has_adapter(config: Mapping[str, Any]) -> bool:
    """Return whether a component with this configuration has an IP-Adapter, as a UNet saved with one."""
    return config.get("encoder_hid_dim_type") == "ip_image_proj"


def is_count(name: str) -> bool:
    """Return whether an argument of a pipeline is the number of results for one prompt."""
    return _COUNT.fullmatch(name) is not None


def is_video(name: str) -> bool:
    """Return whether an argument that is an image by its name is a video."""
    return name.endswith(("video", "videos", "conditioning_frames"))


def is_mask_of_video(name: str, takes: PipelineSignature) -> bool:
    """Return whether an argument is a mask for each frame of a video."""
    return name in takes.listed and name.endswith(("mask", "masks"))


def _is_image(item: inspect.Parameter) -> bool:
    found = _PICTURE.search(item.name) is not None or "Image" in str(item.annotation)
    return found and not only_numbers(forms_of(item)) and item.name != "image" and _NO_PICTURE.search(item.name) is None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _has_number_keys(default: Any) -> bool:
    return isinstance(default, dict) and bool(default) and all(type(key) is int for key in default)


def signature_from(
    class_name: str, calls: Iterable[Sequence[inspect.Parameter]], model_index: Mapping[str, Any] | None = None
) -> PipelineSignature:
    """Return the signature of a class whose `__call__` takes the first of `calls`, with self; the next is the one that
    it overrides, and so on.

    If it also has **kwargs, the named parameters of the next count too: it may pass names on. Most pipelines silently
    ignore any other name in **kwargs, so it does not count.
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
        images=tuple(item.name for item in found.values() if _is_image(item)),
        listed=tuple(item.name for item in found.values() if _is_image(item) and is_list(item)),
        tensors=tuple(item.name for item in found.values() if is_tensor(item)),
        tuples={item.name: size for item in found.values() if (size := tuple_length(item)) is not None},
        text_lists=tuple(item.name for item in found.values() if is_list(item, of="str")),
        number_keys=tuple(item.name for item in found.values() if _has_number_keys(item.default)),
        forms={item.name: forms for item in found.values() if (forms := forms_of(item))},
        native_fps=24.0 if (model_index or {}).get("expand_timesteps") else None,
    )
