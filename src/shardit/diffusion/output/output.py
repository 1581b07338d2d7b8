"""The result of a request in memory: images, videos, sound, text or numbers; and saving it to files."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.diffusion.output.arrays import by_name, images_of_map, named_arrays, pixels_of
from shardit.diffusion.output.encode import is_transparent, record_text, too_long, write_image, write_video
from shardit.diffusion.output.sound import MOST_SAMPLES, write_wav
from shardit.diffusion.output.target import IN_WORDS, SUFFIXES, check_path, linked, numbered, path_of
from shardit.diffusion.request.returned import MAPS, Kind
from shardit.errors import InputError, NothingToSaveError
from shardit.params import FRAME_RATE
from shardit.settings.checks import whole

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Output:
    """The result of one request."""

    prompt: str | None
    """The prompt; None if embeddings were given."""
    seed: int
    """The seed that was used, given or drawn."""
    images: Sequence[Image] = ()
    """Images (for layered pipelines: layers), empty for videos."""
    frames: Sequence[Sequence[Image]] | None = None
    """One list of frames for each video, None for images."""
    latents: Any = None
    """The result as numbers: latents before the VAE for output_type="latent", pixels for "np" (array) and "pt"
    (tensor)."""
    audio: Any = None
    """Sound, a float32 tensor of (outputs, channels, samples), of an audio pipeline or of a video; None without
    sound."""
    sample_rate: int | None = None
    """Samples per second of `audio`; None without sound, or if the model does not define it."""
    texts: Sequence[str] = ()
    """Texts, of a pipeline that writes text."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """All other fields of the pipeline's result by name: tensors, arrays, numbers, images, and lists and dicts of
    these."""
    error: str | None = None
    """Reason of a missing result, in one line; None if there is a result."""
    seconds: float = 0.0
    """Wall time of the request, in seconds."""
    peak_bytes: Sequence[int] = ()
    """Peak memory of each rank, in bytes."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Further measurements by name."""
    fps: float = 24.0
    """Frames per second of a saved video."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The chosen arguments as JSON values (`Request.settings`), recorded in saved files."""

    @property
    def notes(self) -> list[str]:
        """Differences from the request, such as sizes rounded by the pipeline, and warnings of the pipeline, such as a
        truncated prompt."""
        images = self.frames[0] if self.frames else self.pictures()
        warnings = [str(line) for line in self.metrics.get("warnings", ())]
        if not images:
            return warnings
        got = {"width": images[0].width, "height": images[0].height}
        if self.frames:
            got["num_frames"] = len(images)
        asked = {name: self.settings.get(name) for name in got}
        return [
            f"{name}: asked for {asked[name]}, the pipeline made {got[name]}"
            for name in got
            if asked[name] is not None and asked[name] != got[name]
        ] + warnings

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of files that `save` can write, the most significant first; () if there are none."""
        held: dict[Kind, bool] = {
            "video": bool(self.frames),
            "image": bool(self.pictures()),
            "audio": self.audio is not None and bool(self.sample_rate),
            "text": bool(self.texts),
            "tensors": bool(self.images or self.frames or self._numbers()),
        }
        return tuple(kind for kind, there in held.items() if there)

    def pictures(self) -> Sequence[Image]:
        """`images`, or if there are none the images of a map in `extra` (depth, normals)."""
        if self.images:
            return self.images
        return next((made for name in MAPS if name in self.extra and (made := images_of_map(self.extra[name]))), [])

    def save(self, path: str | os.PathLike[str], *, quality: int | None = None, fps: float | None = None) -> list[Path]:
        """Write the content that fits the extension: images (.png, .jpg, .webp), videos with their sound (.mp4),
        sound (.wav), text (.txt), or all numbers in one file by name (.safetensors): `latents`, `audio`, `extra`, and
        the pixels of images, from 0 to 255, as `images` (number, height, width, channels) and of videos as
        `frames.0`, `frames.1`.

        quality: of JPEG and WebP, 0 to 100; None and 100 mean the best there is (95 without colour subsampling, and
        lossless). fps: of a video; None means the attribute `fps`.
        Several become name-0.png, name-1.png, ... Seed and settings are recorded in the file (not in text). Files
        appear complete or not at all, and existing ones are replaced (of a symbolic link, the file to which it leads).
        Returns the paths. Raises `InputError` if this
        output is an error or has nothing to save, the folder is missing, the extension does not fit, the sample rate is
        not known, `quality` or `fps` is given for another format or the disk is full.
        """
        target = path_of(path)
        if self.error is not None:
            raise InputError(f"the request failed: {_one_line(self.error)}")
        kinds = self.kinds
        if not kinds:
            raise NothingToSaveError("nothing to save, the output holds no images; leave out output_type")
        if self.audio is not None and target.suffix.lower() in SUFFIXES["audio"]:
            self._sound(self.audio)
        check_path(target, kinds, transparent=any(map(is_transparent, self.images)))
        kind: Kind = next(kind for kind in kinds if target.suffix.lower() in SUFFIXES[kind])
        _check_quality(quality, target)
        if fps is not None:
            _check_fps(fps, target)
            return replace(self, fps=fps).save(target, quality=quality)
        writers = self._writers(kind, quality)
        if not writers:
            raise NothingToSaveError(f"nothing to save, the output holds no {IN_WORDS[kind]}")
        size = _largest(self.frames[0] if self.frames else self.pictures())
        targets = [check_path(name, kind, size=size) for name in numbered(target, len(writers))]
        return _write_all(dict(zip(targets, writers, strict=True)))

    def left_out(self, path: str | os.PathLike[str]) -> list[str]:
        """Return the names of the pipeline's results, and of settings in its record, that a file of this name does not
        contain."""
        suffix = Path(path).suffix.lower()
        kind = next((kind for kind in self.kinds if suffix in SUFFIXES[kind]), None)
        fields = {"frames": self.frames, "images": self.images, "texts": self.texts, **self.extra}
        written = {"video": ("frames",), "image": ("images", *MAPS), "text": ("texts",)}.get(kind or "", ())
        if kind == "tensors":
            arrays = self._arrays()
            written = [name for name in fields if any(f"{key}.".startswith(f"{name}.") for key in arrays)]
        sound = {} if self.audio is None or kind in ("video", "audio", "tensors") else {"audio": self.audio}
        settings = too_long(self.record()) if suffix in (".jpg", ".jpeg") else []
        return [
            *(name for name, value in {**fields, **sound}.items() if name not in written and _is_informative(value)),
            *settings,
        ]

    def _writers(self, kind: Kind, quality: int | None) -> list[Writer]:
        record = self.record()
        if kind == "video":
            FRAME_RATE("fps", self.fps)
            sounds = [None] * len(self.frames or ()) if self.audio is None else [self._sound(one) for one in self.audio]
            if len(sounds) != len(self.frames or ()):
                raise InputError(f"{len(sounds)} waveforms for {len(self.frames or ())} videos; save them as .wav")
            return [
                _video_writer(frames, self.fps, record, sound)
                for frames, sound in zip(self.frames or (), sounds, strict=True)
            ]
        if kind == "image":
            return [_image_writer(image, record, quality) for image in self.pictures()]
        if kind == "audio":
            return [_sound_writer(self._sound(one), record) for one in self.audio]
        if kind == "text":
            return [_text_writer(text) for text in self.texts]
        return [_array_writer(self._arrays(), record)]

    def _sound(self, waveform: Any) -> tuple[Any, int]:
        if not self.sample_rate:
            raise InputError("the model does not define its sample rate; dataclasses.replace(output, sample_rate=...)")
        whole(1, MOST_SAMPLES)("sample_rate", self.sample_rate)
        return waveform, int(self.sample_rate)

    def _numbers(self) -> dict[str, Any]:
        held = {"latents": self.latents, "audio": self.audio, **self.extra}
        return by_name(pair for field, value in held.items() for pair in named_arrays(value, field))

    def _arrays(self) -> dict[str, Any]:
        """Return all arrays of a .safetensors file; images and frames as their pixels, from 0 to 255."""
        shown = {"images": pixels_of(self.images), "frames": [pixels_of(video) for video in self.frames or ()]}
        pixels = [pair for field, value in shown.items() for pair in named_arrays(value, field)]
        return by_name([*self._numbers().items(), *pixels])

    def record(self) -> dict[str, Any]:
        """Return the metadata of saved files: enough to make the output again."""
        rate: dict[str, Any] = {"fps": self.fps} if self.frames else {}
        rate |= {"sample_rate": self.sample_rate} if self.audio is not None else {}
        images = self.frames[0] if self.frames else self.pictures()
        made = {"width": images[0].width, "height": images[0].height} if images else {}
        made |= {"num_frames": len(images)} if self.frames else {}
        about = {"software": "shardit", "prompt": self.prompt, "seed": self.seed, **({"made": made} if made else {})}
        return {**about, **rate, **self.settings}


def savable(output: Output) -> tuple[Output, list[str]]:
    """Return the output in a form that can be saved without a sample rate from the user (a video without its sound if
    the model does not define a rate), and a note of that."""
    if not output.frames or output.audio is None or output.sample_rate:
        return output, []
    return replace(output, audio=None), ["not in the file: audio, because the model does not define its sample rate"]


def _check_quality(quality: object, target: Path) -> None:
    if quality is None:
        return
    whole(0, 100)("quality", quality)
    if quality != 100 and target.suffix.lower() not in (".jpg", ".jpeg", ".webp"):
        raise InputError(f"quality is of JPEG and WebP, not of {target.suffix} files; leave it out")


def _check_fps(fps: object, target: Path) -> None:
    FRAME_RATE("fps", fps)
    if target.suffix.lower() not in SUFFIXES["video"]:
        raise InputError(f"fps is of videos, not of {target.suffix} files; leave it out")


def _largest(images: Sequence[Image]) -> tuple[int, int]:
    return max((one.width for one in images), default=0), max((one.height for one in images), default=0)


Writer = Callable[[Path], None]


def _image_writer(image: Image, record: Mapping[str, Any], quality: int | None) -> Writer:
    return lambda path: write_image(image, path, record, quality)


def _video_writer(
    frames: Sequence[Image], fps: float, record: Mapping[str, Any], sound: tuple[Any, int] | None
) -> Writer:
    return lambda path: write_video(frames, path, fps, record, sound)


def _sound_writer(sound: tuple[Any, int], record: Mapping[str, Any]) -> Writer:
    return lambda path: write_wav(sound[0], path, sound[1], record_text(record))


def _text_writer(text: str) -> Writer:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    return write


def _array_writer(arrays: Mapping[str, Any], record: Mapping[str, Any]) -> Writer:
    def write(path: Path) -> None:
        from safetensors.numpy import save

        path.write_bytes(save(dict(arrays), {"settings": record_text(record)}))

    return write


def _is_informative(value: Any) -> bool:
    """Return whether leaving out a value loses information: empty values and lists of flags that are all off do not
    count."""
    if isinstance(value, (list, tuple)):
        return any(_is_informative(each) for each in value)
    return value is not None and value is not False and not (isinstance(value, (str, Mapping)) and not value)


def _write_all(writers: Mapping[Path, Writer]) -> list[Path]:
    """Write every file under another name first, so that there are either all of them or none."""
    # In the folder of the target, because a rename is a single step only within one file system. The suffix stays last:
    # encoders choose the format by it.
    real = {path: linked(path) for path in writers}
    hidden = {path: real[path].with_name(f".shardit-{secrets.token_hex(6)}{path.suffix}") for path in writers}
    with _removed_on_error(list(hidden.values())):
        for path, write in writers.items():
            with _one_line_os_error(path):
                write(hidden[path])
                _to_disk(hidden[path])
        for path, partial in hidden.items():
            with _one_line_os_error(path):
                os.replace(partial, real[path])
    return list(writers)


def _to_disk(path: Path) -> None:
    # Some file systems report a full disk only when the data is really written.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _removed_on_error(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C too must leave nothing behind
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _one_line_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space or choose another folder" if full else "choose another path"
        reason = error.strerror or _one_line(str(error))
        raise InputError(f"output {path} cannot be written: {reason}; {advice}") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
