"""Reads input images and converts them to upright 8-bit images in their intended colours."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, ImageOps, ImageSequence

from shardit.errors import InputError, first_filled_line
from shardit.settings.paths import check_name

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

    ImageSource = str | os.PathLike[str] | bytes | Image.Image

Mode = Literal["RGB", "RGBA", "opaque"]

_NOTE, _ON_WHITE = "shardit_note", "its transparent pixels were put on white"
"""The key in `info` of an image under which a note for the user travels with it, and such a note."""

_FRAMES = "shardit_frames"
"""The key in `info` of an image that was the first of several, for their number."""

_EIGHT_BITS, _SIXTEEN_BITS = 255, 65535


def open_image(source: ImageSource, mode: Mode = "RGB") -> Image.Image:
    """Read a file, the bytes of one, or take a PIL image (which is not changed), as an 8-bit image.

    - The EXIF orientation is applied.
    - "RGB" puts transparent images on white, as they appear on a page; "RGBA" keeps transparency and makes opaque
    images fully opaque; "opaque" is "RGB" with the colours that transparent pixels have, as in diffusers: for masks,
    whose strokes programs save on a transparent layer.
    - 16-bit greys are scaled to 8 bits (PIL alone would clip them to white), also those stored with 32 bits. CMYK,
    palettes, grey and black-and-white are converted; colour profiles are not applied, as in diffusers.
    - Only the first frame of an animation is used.

    Raises `InputError` naming the file if it is missing or not an image.
    """
    with _naming(source):
        read = to_eight_bits(_load_upright(source))
        image = to_mode(read, mode)
        # EXIF data and colour profiles are unused, and would be sent to every rank.
        notes = [_ON_WHITE] if mode == "RGB" and _shows_through(read) else []
        if frames := read.info.get(_FRAMES):
            notes.append(f"the first of its {frames} frames was used")
        image.info = {_NOTE: "; ".join(notes)} if notes else {}
        return image


def image_notes(arguments: Mapping[str, Any]) -> list[str]:
    """Return the notes that `open_image` left on images among the arguments of a call."""
    found = {
        f"{name}: {image.info[_NOTE]}": None
        for name, value in arguments.items()
        for image in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(image, Image.Image) and _NOTE in image.info
    }
    return list(found)


def read_image(source: ImageSource) -> Image.Image:
    """Read a file once, for `open_image` to convert it, perhaps several times. Raises the same `InputError`."""
    with _naming(source):
        return _load_upright(source)


@contextmanager
def _naming(source: ImageSource) -> Iterator[None]:
    """Turn errors into InputErrors that name the file."""
    name = _name_of(source)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"image {name} does not exist; correct the path") from None
    # PIL's decoders raise nearly anything on damaged data: SyntaxError, struct.error, EOFError, ValueError, ...
    except Exception as error:
        raise InputError(f"image {name} cannot be read: {reason(error)}; give a PNG, JPEG or WebP file") from error


def is_file(value: object) -> bool:
    """Return whether a value is a path or the bytes of a file, rather than an image already."""
    return isinstance(value, (str, os.PathLike, bytes))


def open_video(source: str | os.PathLike[str] | bytes) -> list[Image.Image]:
    """Read a video or an animation, a file or the bytes of one, as a list of upright RGB images.

    Raises `InputError` naming the file if it is missing or not a video.
    """
    name = _name_of(source)
    if isinstance(source, str) and source.split("://")[0] in ("http", "https"):
        raise InputError(f"video {source} is an address; download it and give the file")
    if not isinstance(source, bytes):
        check_name("video", source)
        if not Path(source).is_file():
            raise InputError(f"video {name} does not exist; correct the path")
    if (animation := _frames_of_animation(source)) is not None:
        return animation
    import av  # its libraries take a while to load
    from av.error import FFmpegError

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            frames, end, longest = _frames_until_end(container)
            whole = (container.duration or 0) / av.time_base
    except (FFmpegError, IndexError, ValueError) as error:
        raise InputError(f"video {name} cannot be read: {reason(error)}; give a video file, such as MP4") from error
    if not frames:
        raise InputError(f"video {name} has no frames; give another file")
    if end < whole - 2 * longest:  # the last frame may have no length of its own
        raise InputError(f"video {name} ends after {end:.3g} s of {whole:.3g} s: it is cut off; give the whole file")
    return frames


def _frames_until_end(container: InputContainer) -> tuple[list[Image.Image], float, float]:
    """Return the frames of a video, the time at which its last packet of images or sound ends, and the longest time
    from one packet of images to the next, in seconds."""
    stream, end = container.streams.video[0], 0.0
    frames: list[Image.Image] = []
    times: list[float] = []
    for packet in container.demux():
        is_image = packet.stream.index == stream.index
        if packet.pts is not None:
            begin = float(packet.pts * packet.time_base) - (container.start_time or 0) / 1e6
            end = max(end, begin + float((packet.duration or 0) * packet.time_base))
            times += [begin] if is_image else []
        if is_image:
            frames += [turned(frame, frame.to_image()) for frame in stream.decode(packet)]
    times.sort()
    return frames, end, max((later - one for one, later in pairwise(times)), default=end)


def _frames_of_animation(source: str | os.PathLike[str] | bytes) -> list[Image.Image] | None:
    """Return the frames of a GIF or another animated image; None for other files. ffmpeg, which reads videos, leaves
    out frames of some GIFs."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if not getattr(image, "is_animated", False):
                return None
            return [open_image(frame.copy()) for frame in ImageSequence.Iterator(image)]
    except Image.UnidentifiedImageError:
        return None
    except Exception as error:  # as for images
        raise InputError(f"video {_name_of(source)} cannot be read: {reason(error)}; give another file") from error


def turned(frame: VideoFrame, image: Image.Image) -> Image.Image:
    """Rotate the image of a frame as players do: phones store their orientation as a rotation."""
    degrees = getattr(frame, "rotation", 0)
    return image.rotate(degrees, expand=True) if degrees else image


def _name_of(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return str(Path(source)) if str(source) else "''"
    return "given as bytes" if isinstance(source, bytes) else "given as an image"


def _load_upright(source: ImageSource) -> Image.Image:
    # exif_transpose always makes a copy, so the caller's image stays as it is. It must run before the file is closed:
    # some formats read their EXIF data only when asked.
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    if isinstance(source, str) and source.split("://")[0] in ("http", "https"):
        raise InputError(f"image {source} is an address; download it and give the file")
    if not isinstance(source, (str, os.PathLike, bytes)):
        rows = "; rows of images go through shardit.parallelize only" if isinstance(source, (list, tuple)) else ""
        raise InputError(f"an image must be a path, bytes or a PIL image, got {type(source).__name__}{rows}")
    if not isinstance(source, bytes):
        check_name("image", source)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if image.format != "MPO" and getattr(image, "is_animated", False):  # photos are the first image of an MPO
            upright.info[_FRAMES] = getattr(image, "n_frames", 1)
        return upright


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image with 16 bits scaled to 8, any other as it is. Raises InputError for floating-point values, and
    for whole numbers of more bits."""
    if image.mode == "F":
        raise InputError("an image with floating-point values has no defined brightness; save it with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = image if image.mode == "I" else image.convert("I")
        limits: Any = wide.getextrema()
        if limits[0] < 0 or limits[1] > _SIXTEEN_BITS:
            raise InputError("an image with values of 32 bits has no defined brightness; save it with 8 bits")
        if image.mode == "I" and limits[1] <= _EIGHT_BITS:  # as diffusers takes them
            return wide.convert("L")
        # 65535 must become 255, so the factor is 1/257, not 1/256.
        narrow = wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
        narrow.info.pop("transparency", None)  # a 16-bit colour key means nothing here any more
        return narrow
    return image


def to_mode(image: Image.Image, mode: Mode, background: str = "white") -> Image.Image:
    """Return an 8-bit image in a mode, as of `open_image`; "RGB" puts it on `background`."""
    if mode == "opaque":
        return image.convert("RGBA").convert("RGB")
    if image.mode == mode and "transparency" not in image.info:
        return image.copy()
    transparent = _may_be_transparent(image)
    image = _plain_alpha(image)
    if mode == "RGBA" or not transparent:
        return image.convert(mode)
    image = image.convert("RGBA")
    behind = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(behind, image).convert("RGB")


def _may_be_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")


def _plain_alpha(image: Image.Image) -> Image.Image:
    """Return a premultiplied image in its plain form, the only one to which PIL converts it."""
    return image.convert(image.mode.upper()) if image.mode in ("RGBa", "La") else image


def _shows_through(image: Image.Image) -> bool:
    """Return whether an 8-bit image has pixels that are not opaque."""
    if not _may_be_transparent(image):
        return False
    alpha = _plain_alpha(image).convert("RGBA").getchannel("A")
    return alpha.getextrema()[0] < 255  # pyright: ignore[reportOperatorIssue]


def reason(error: Exception) -> str:
    """Return in a few words why a file cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image in a known format"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    return first_filled_line(str(error)) or type(error).__name__
