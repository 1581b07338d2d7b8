"""Writes one image or one video to one file, with the settings of its request in the metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shardit.diffusion.output.sound import add_track, write_track
from shardit.errors import InputError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import OutputContainer
    from av.video.stream import VideoStream

EXIF_DESCRIPTION = 0x010E
"""The JPEG or WebP tag for the record."""
# The EXIF data of a JPEG must fit one segment of 64 KiB.
_LONGEST_EXIF = 60_000
LEFT_OUT = "left_out"
"""Entry of a record with the names of those that a file has no room for."""
# Constant rate factor of H.264 (0 lossless .. 51): 17 looks like the original. The preset takes half
# the time of the usual one, for 0.3 dB and a file that is no larger.
# With x264's trees of macroblocks the same frames of small videos give one of several files (seen with AVX-512).
_QUALITY = {"preset": "veryfast", "crf": "17", "mbtree": "0"}
_MODES = {
    ".png": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    ".jpg": ("1", "L", "RGB", "CMYK"),
    ".webp": ("L", "RGB", "RGBA"),
}
"""Modes of images by the formats that hold them unchanged."""
_BT709 = 1  # the code of this colour space in H.264, and of its primaries and transfer curve
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG, the default of players


def write_image(image: Image.Image, path: Path, record: Mapping[str, Any], quality: int | None = None) -> None:
    """Write one image; the suffix decides the format. quality: for JPEG and WebP, 0 to 100; None and 100 mean the
    best.

    PNG gets one text chunk for each of prompt and seed and one, "settings", with the whole record as JSON; JPEG and
    WebP get that JSON as the EXIF image description. PNG, and WebP at its best, are lossless.
    """
    # Encoded in memory first: PIL's encoders do not notice when the disk takes only part of a file.
    encoded = io.BytesIO()
    _encode(image, encoded, path.suffix.lower(), record, None if quality == 100 else quality)
    path.write_bytes(encoded.getvalue())


def _encode(image: Image.Image, into: io.BytesIO, suffix: str, record: Mapping[str, Any], quality: int | None) -> None:
    image = _in_mode_of(image, suffix)
    if suffix == ".png":
        info = PngInfo()
        for name in ("prompt", "seed"):
            if record.get(name) is not None:
                _add_text(info, name, str(record[name]))
        _add_text(info, "settings", record_text(record))
        image.save(into, format="PNG", pnginfo=info)
        return
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = record_text(record) if suffix == ".webp" else _shortened(record)
    if suffix == ".webp":
        chosen = {"lossless": True, "exact": True} if quality is None else {"quality": quality}
        image.save(into, format="WEBP", exif=exif, **chosen)
    else:
        chosen = {"quality": 95, "subsampling": 0} if quality is None else {"quality": quality}
        image.save(into, format="JPEG", exif=exif, **chosen)


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image has an alpha channel or a transparent colour."""
    return "A" in image.mode or "transparency" in image.info


def _in_mode_of(image: Image.Image, suffix: str) -> Image.Image:
    """Return an image in a mode that files of that extension hold. Raises InputError if there is none."""
    if image.mode in ("F", "I"):
        raise InputError(
            f"an image of mode {image.mode} has numbers of no defined brightness; use .safetensors, or convert it"
        )
    if image.mode == "I;16" and suffix != ".png":  # the other formats have 8 bits
        return _eight_bits(image)
    if image.mode in _MODES[suffix.replace("jpeg", "jpg")]:
        return image
    return image.convert("RGBA" if is_transparent(image) else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    return Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))


def write_video(
    frames: Sequence[Image.Image],
    path: Path,
    fps: float,
    record: Mapping[str, Any],
    sound: tuple[Any, int] | None = None,
) -> None:
    """Write one video as H.264 in MP4, in the one pixel format that every player shows (yuv420p). Its sound, a waveform
    of (channels, samples) and its sample rate, becomes AAC.

    That format needs even sizes: an odd size gets one more column or row, a copy of the last. The record becomes the
    container's comment, as JSON.
    """
    import av  # its libraries take a while to load, and images do not need them

    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = record_text(record)
        stream = _add_stream(container, frames[0].size, Fraction(fps).limit_denominator(1001))
        track = add_track(container, *sound) if sound is not None else None
        for frame in _even_frames(frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None and track is not None:
            write_track(container, track, *sound)


def record_text(record: Mapping[str, Any]) -> str:
    """Return the metadata of a file as one line of JSON, in ASCII so that every format and reader accepts it."""
    return json.dumps(record, ensure_ascii=True, default=str)


def _add_text(info: PngInfo, name: str, text: str) -> None:
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # half characters, which UTF-8 lacks
    # Plain text chunks are Latin-1 and lose other scripts; the international ones are UTF-8.
    (info.add_text if text.isascii() else info.add_itxt)(name, text)


def too_long(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the longest entries of a record, which a JPEG has no room for."""
    kept, names = dict(record), list[str]()
    while len(record_text({**kept, LEFT_OUT: names})) > _LONGEST_EXIF:
        names.append(max(kept, key=lambda name: len(record_text({name: kept[name]}))))
        del kept[names[-1]]
    return names


def _shortened(record: Mapping[str, Any]) -> str:
    names = too_long(record)
    kept = {name: value for name, value in record.items() if name not in names}
    return record_text({**kept, LEFT_OUT: names} if names else kept)


def _add_stream(container: OutputContainer, size: tuple[int, int], rate: Fraction) -> VideoStream:
    stream: Any = container.add_stream(_codec_name(), rate=rate)
    stream.width, stream.height = (side + side % 2 for side in size)
    stream.pix_fmt = "yuv420p"
    if stream.codec.name == "libx264":
        stream.options = _QUALITY
    else:
        stream.bit_rate = 20_000_000  # encoders without a quality setting would choose a very low rate
    # Written explicitly, because players guess the colours of small videos differently from those of large ones.
    context = stream.codec_context
    context.thread_type = "FRAME"  # faster than threads that share a frame
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def _codec_name() -> str:
    """Return the best H.264 encoder of this PyAV build, MPEG-4 if it has none."""
    import av

    for name in ("libx264", "libopenh264", "mpeg4"):
        if name in av.codecs_available:
            return name
    raise InputError("this build of PyAV has no encoder for MP4; install one that has: pip install av")


def _even_frames(frames: Sequence[Image.Image]) -> Iterator[VideoFrame]:
    import av
    import numpy as np
    from av.video.reformatter import VideoReformatter

    reformatter: Any = VideoReformatter()  # a new one for each frame, as in `reformat`, costs more than its work
    for frame in frames:
        pixels = np.asarray(frame if frame.mode == "RGB" else frame.convert("RGB"))
        height, width, _ = pixels.shape
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        rgb: Any = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        yield reformatter.reformat(rgb, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1)
