"""Clips in files: their first frames at the rate asked for, upright, cut and resized to the size asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shardit.diffusion.request.images import to_mode, turned
from shardit.errors import InputError
from shardit.training.data.media import Extent, Reading, array, file_digest, fit, unreadable

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

ENDINGS = (".mp4", ".mov", ".webm", ".mkv", ".gif")
"""Endings of clip files, in small letters."""

_REORDERED = 32
"""Packets that may come before one with an earlier frame, at most."""

_HIDDEN_FRAMES = ("vp8", "libvpx")
"""Codecs with packets whose frames are not shown."""

_HDR = {16: "PQ", 18: "HLG"}
"""Brightness curves of HDR, by their number in the standard (H.273)."""

_EARLY = 0.49
"""Share of its duration by which a frame may be shown early: of two frames, the nearer one is taken."""


@dataclass(frozen=True)
class Clip:
    """A clip in a file."""

    path: Path
    moving = True

    def extent(self, reading: Reading) -> Extent:
        """As `Media.extent`. The first frame is decoded, the others are counted by their packets."""
        with _opened(self.path) as (container, stream):
            first = next(container.decode(stream), None)
            if first is None:
                raise InputError("it has no frames")
            notes = _colour_notes(stream)
            wide, high = _upright(first, reading.background).size
            aspect = _pixel_aspect(stream, first)
        with _opened(self.path) as (container, stream):
            rate = _rate(stream)
            count = _count(_packet_times(container, stream, reading), rate, reading.fps)
        width, height = (round(wide * aspect), high) if aspect >= 1 else (wide, round(high / aspect))
        if reading.fps is not None and reading.fps > rate * 1.01:
            notes += (f"has {rate:.4g} frames per second, fewer than {reading.fps:g}: frames are repeated",)
        return Extent(width, height, min(count, reading.frames), notes)

    def read(self, reading: Reading, width: int, height: int, frames: int) -> NDArray[np.uint8]:
        """As `Media.read`."""
        made: list[Image.Image] = []
        with _opened(self.path) as (container, stream):
            for frame, times in _at_rate(container.decode(stream), _rate(stream), reading.fps):
                image = _upright(frame, reading.background)
                made += [fit(image, width, height, _pixel_aspect(stream, frame))] * min(times, frames - len(made))
                if len(made) == frames:
                    return array(made)
            raise InputError(f"{len(made)} frames can be decoded, of {frames} that it lists")

    def digest(self) -> str:
        """As `Media.digest`."""
        return file_digest(self.path, sampled=True)


def _count(times: list[float], rate: float, fps: float | None) -> int:
    """Return how many frames there are at `fps`, given the times of a clip's own."""
    if fps is None or not times:
        return len(times)
    return _shown_before(max(times) - min(times) + 1 / rate, rate, fps)


def _at_rate(frames: Iterator[VideoFrame], rate: float, fps: float | None) -> Iterator[tuple[VideoFrame, int]]:
    """Yield frames with the number of times that each is shown at `fps`, if that is not 0."""
    if fps is None:
        yield from ((frame, 1) for frame in frames)
        return
    start, done, time, held = None, 0, 0.0, None
    for number, frame in enumerate(frames):
        now = number / rate if frame.time is None else frame.time
        start = now if start is None else start
        time = now - start
        until = _shown_before(time, rate, fps)
        if held is not None and until > done:
            yield held, until - done
            done = until
        held = frame
    until = _shown_before(time + 1 / rate, rate, fps)
    if held is not None and until > done:
        yield held, until - done


def _shown_before(time: float, rate: float, fps: float) -> int:
    """Return how many frames at `fps` come before the one of a clip that starts at `time`."""
    return max(0, math.ceil((time - _EARLY / rate) * fps))


def _packet_times(container: InputContainer, stream: VideoStream, reading: Reading) -> list[float]:
    """Return the times of a clip's frames, in any order: all, or so many that the reading needs no more."""
    if stream.codec_context.name in _HIDDEN_FRAMES:
        return [float(frame.time or 0) for frame in container.decode(stream)]
    times: list[float] = []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or stamp is None or packet.is_discard:
            continue
        times.append(float(stamp * packet.time_base))
        enough = reading.fps is None or times[-1] - times[0] > (reading.frames + 1) / reading.fps
        if enough and len(times) > reading.frames + _REORDERED:
            break
    return times


def _rate(stream: VideoStream) -> float:
    """Return the frames per second that a container states; 25 if it states none."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def _upright(frame: VideoFrame, background: str) -> Image.Image:
    if any(component.is_alpha for component in frame.format.components):
        image = to_mode(Image.fromarray(frame.to_ndarray(format="rgba")), "RGB", background)
    else:
        image = frame.to_image()
    return turned(frame, image)


def _colour_notes(stream: VideoStream) -> tuple[str, ...]:
    kind = _HDR.get(int(stream.codec_context.color_trc or 0))
    return (f"has HDR colours ({kind}), which are not converted: it looks pale",) if kind else ()


def _pixel_aspect(stream: VideoStream, frame: VideoFrame) -> float:
    """Return the width of a clip's pixels over their height, once it is upright."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return 1 / aspect if getattr(frame, "rotation", 0) % 180 else aspect


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    import av  # its libraries take a while to load

    try:
        if path.stat().st_size == 0:
            raise InputError("the file is empty")
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError("it has no images")
            yield container, container.streams.video[0]
    # Damaged data raise nearly anything: errors of av, EOFError, MemoryError, ...
    except Exception as error:
        raise unreadable("clip", path, error) from error
