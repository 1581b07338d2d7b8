"""Small files of pictures, clips and captions for the tests of data."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from shardit.training.data.buckets import Format

PICTURES = Format(32, 32, multiple=1)
"""A model of pictures that takes any size."""

VIDEOS = Format(32, 32, multiple=16, frames=9, takes_frames=lambda frames: frames % 4 == 1)
"""A model of videos such as Wan."""


def picture(path: Path, size: tuple[int, int] = (8, 8), colour: Any = "red", **options: Any) -> Path:
    """Write a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def folder(root: Path, files: Mapping[str, str | bytes | None]) -> Path:
    """Write a folder of files by name: a text, bytes, or None for a small picture or clip."""
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif path.suffix == ".mp4":
            clip(path, 5, grey=number * 3)
        else:
            picture(path, colour=(number * 7, 0, 0))
    return root


def clip(
    path: Path, frames: int, *, size: tuple[int, int] = (32, 32), fps: float = 8, grey: int = 0, **more: Any
) -> Path:
    """Write a clip whose frame n is a grey of `grey` + 8 * n; lossless for MKV, nearly so for others.

    more: step (in place of 8), codec, pix_fmt, aspect (of pixels), curve (of brightness, as a number of H.273), times
    (of frames, in 1/1000 s), options.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = more.get("codec") or {".mkv": "ffv1", ".webm": "libvpx-vp9", ".gif": "gif"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt = more.get("pix_fmt") or {"ffv1": "bgr0", "gif": "rgb8"}.get(codec, "yuv420p")
        stream.options = more.get("options", {"crf": "4"} if codec in ("libx264", "libvpx-vp9") else {})
        if "curve" in more:
            stream.codec_context.color_trc = more["curve"]
        if "aspect" in more:
            stream.sample_aspect_ratio = more["aspect"]
        for number in range(frames):
            shade = grey + more.get("step", 8) * number
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), shade, np.uint8), format="rgb24")
            if "times" in more:
                frame.pts, frame.time_base = more["times"][number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
