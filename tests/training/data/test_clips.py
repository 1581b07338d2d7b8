"""Clips are read at the rate and the length that are asked for, upright, on a background."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from shardit.errors import InputError
from shardit.training.data.buckets import Format
from shardit.training.data.clips import Clip
from shardit.training.data.dataset import Dataset, open_dataset
from shardit.training.data.media import Extent, Reading
from shardit.training.settings import TrainSettings
from tests.training.data.files import PICTURES, VIDEOS, clip, picture


def data(folder: Path, format: Format = VIDEOS, **settings: Any) -> Dataset:
    return open_dataset(TrainSettings(data=str(folder), **settings), format)


def greys(path: Path, frames: int, fps: float | None = None, step: int = 8) -> list[int]:
    """Which frames of a clip of `files.clip` are read, by their grey."""
    read = Clip(path).read(Reading(frames, fps), 8, 8, frames)
    assert read.shape == (frames, 8, 8, 3)
    return [round(float(frame.mean()) / step) for frame in read]


ENDINGS = [".mp4", ".mov", ".mkv", ".webm", ".gif"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_own_rate(tmp_path: Path, ending: str) -> None:
    path = clip(tmp_path / f"a{ending}", 9, grey=0)
    assert Clip(path).extent(Reading(30)).frames == 9
    assert Clip(path).extent(Reading(5)).frames == 5
    shown = Clip(path).read(Reading(9), 8, 8, 9).mean((1, 2, 3))
    assert len(shown) == 9
    if ending != ".gif":  # which has few colours
        assert greys(path, 9) == list(range(9))
    else:
        assert (np.diff(shown) >= -1).all()


def nearest(times: list[float], at: float, rate: float) -> int:
    """The last frame that has started by a time, or nearly so."""
    return max(number for number, time in enumerate(times) if time <= at + 0.49 / rate)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("fps", [8, 4, 2, 3, 6, 7.5])
def test_another_rate(tmp_path: Path, ending: str, fps: float) -> None:
    path = clip(tmp_path / f"a{ending}", 17)
    count = int(16 / 8 * fps) + 1
    expected = [nearest([n / 8 for n in range(17)], number / fps, 8) for number in range(count)]
    extent = Clip(path).extent(Reading(100, fps))
    assert (extent.frames, extent.notes) == (count, ())
    assert greys(path, count, fps) == expected
    if 8 % fps == 0:
        assert expected == list(range(0, 17, 8 // int(fps)))


def test_a_higher_rate_repeats_frames_with_a_note(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", 5)
    extent = Clip(path).extent(Reading(100, 16))
    assert extent.frames == 10
    assert extent.notes == ("has 8 frames per second, fewer than 16: frames are repeated",)
    assert greys(path, 10, 16) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(("fps", "asked"), [(24000 / 1001, 24), (30000 / 1001, 30), (25, 25), (60, 60)])
def test_common_rates_keep_each_frame(tmp_path: Path, fps: float, asked: float) -> None:
    for ending, count in ((".mp4", 24), (".mkv", 81), (".mkv", 80)):
        path = clip(tmp_path / f"{count}{ending}", count, fps=fps, step=3)
        assert Clip(path).extent(Reading(100, asked)) == Extent(32, 32, count)
        assert greys(path, count, asked, step=3) == list(range(count))


def test_uneven_times(tmp_path: Path) -> None:
    times = [0, 100, 200, 700, 800, 900, 1000, 1500]
    path = clip(tmp_path / "a.mkv", 8, fps=10, times=times)
    assert greys(path, 8) == list(range(8))
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
    expected = [nearest([time / 1000 for time in times], number / 4, rate) for number in range(7)]
    assert expected == [0, 2, 2, 3, 6, 6, 7]
    assert greys(path, 7, 4) == expected


def test_the_first_frame_may_come_late(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", 8, fps=10, times=[5000 + 100 * n for n in range(8)])
    assert greys(path, 4, 5) == [0, 2, 4, 6]
    assert Clip(path).extent(Reading(100, 5)).frames == 4


def test_counting_stops_where_enough_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "a.mkv", 200, size=(16, 16), step=1)
    from shardit.training.data import clips

    seen: list[int] = []
    times = clips._packet_times
    monkeypatch.setattr(clips, "_packet_times", lambda *given: seen.append(len(made := times(*given))) or made)
    assert Clip(path).extent(Reading(9)).frames == 9
    assert Clip(path).extent(Reading(9, 4)).frames == 9
    assert max(seen) < 60
    assert Clip(path).extent(Reading(10_000)).frames == 200


@pytest.mark.parametrize("options", [{"bf": "3", "crf": "4"}, {"bf": "0", "g": "2", "crf": "4"}])
def test_frames_out_of_order(tmp_path: Path, options: dict[str, str]) -> None:
    path = clip(tmp_path / "a.mp4", 30, fps=30, options=options)
    for frames in (1, 3, 9, 30):
        assert Clip(path).extent(Reading(frames)).frames == frames
        assert greys(path, frames) == list(range(frames))


def test_frames_that_are_not_shown(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.webm", 20, codec="libvpx", options={"crf": "4", "b": "1M"})
    made = tmp_path / "hidden.webm"
    with av.open(str(path)) as source, av.open(str(made), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None:
                content = bytearray(bytes(packet))
                content[0] &= 0xEF if number % 5 == 4 else 0xFF  # the bit that shows a frame
                copy = av.Packet(bytes(content))
                copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
                copy.is_keyframe = packet.is_keyframe
                target.mux(copy)
    assert Clip(made).extent(Reading(100)).frames == 16
    assert greys(made, 16) == [number for number in range(20) if number % 5 != 4]


def test_colours(tmp_path: Path) -> None:
    for ending, codec, pixels in (
        (".mkv", "ffv1", "bgr0"),
        (".mp4", "libx264", "yuv420p"),
        (".mkv", "ffv1", "yuv444p"),
    ):
        path = tmp_path / f"{pixels}{ending}"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            shown = np.zeros((32, 32, 3), np.uint8)
            shown[:, :16], shown[:, 16:] = (220, 40, 40), (45, 85, 225)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            container.mux(stream.encode(None))
        read = Clip(path).read(Reading(), 32, 32, 1)[0].astype(int)
        assert np.abs(read[:, :12] - (220, 40, 40)).max() < 8
        assert np.abs(read[:, 20:] - (45, 85, 225)).max() < 8


@pytest.mark.parametrize(("curve", "kind"), [(16, "PQ"), (18, "HLG"), (1, None)])
def test_clips_in_hdr_are_noted(tmp_path: Path, curve: int, kind: str | None) -> None:
    clip(tmp_path / "a.mp4", 9, curve=curve)
    expected = [f"a.mp4: has HDR colours ({kind}), which are not converted: it looks pale"] if kind else []
    assert notes(data(tmp_path), "HDR") == expected


def test_transparent_frames_show_the_background(tmp_path: Path) -> None:
    clear = [Image.new("P", (8, 8), 1) for _ in range(3)]
    for number, one in enumerate(clear):
        one.putpalette([0, 255, 0, 255, 0, 255])
        one.paste(0, (number, 0, number + 4, 8))
    clear[0].save(tmp_path / "a.gif", save_all=True, append_images=clear[1:], transparency=1, disposal=2, duration=100)
    read = Clip(tmp_path / "a.gif").read(Reading(3, background="blue"), 8, 8, 3)
    colours = {tuple(colour) for colour in read.reshape(-1, 3).tolist()}
    assert colours == {(0, 255, 0), (0, 0, 255)}


def turned(path: Path, degrees: int) -> Path:
    """A copy of a clip that is to be shown turned."""
    made = path.with_name(f"turned{degrees}.mp4")
    with av.open(str(path)) as source, av.open(str(made), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = bytearray(made.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    for number, value in enumerate((cosine, sine, 0, -sine, cosine)):
        content[place + 4 * number : place + 4 * number + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    made.write_bytes(content)
    return made


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_clips_that_were_filmed_sideways(tmp_path: Path, degrees: int) -> None:
    path = tmp_path / "a.mp4"
    shown = np.zeros((32, 64, 3), np.uint8)
    shown[:16, :32] = 250  # the upper left quarter
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode(None))
    made = turned(path, degrees)
    extent = Clip(made).extent(Reading(2))
    assert (extent.width, extent.height) == ((64, 32) if degrees == 180 else (32, 64))
    read = Clip(made).read(Reading(2), extent.width, extent.height, 1)[0, ..., 0].astype(int)
    expected = np.rot90(shown[..., 0], -degrees // 90).astype(int)  # clockwise, as the matrix says
    assert np.abs(read - expected).mean() < 10
    assert np.abs(read - expected[::-1, ::-1]).mean() > 50


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 1, size=(32, 32), aspect=Fraction(2, 1))
    extent = Clip(path).extent(Reading())
    assert (extent.width, extent.height) == (64, 32)
    assert data(tmp_path, num_frames=1, resolution="64").samples[0].bucket.width > 64
    half = clip(tmp_path / "b.mp4", 1, size=(32, 32), aspect=Fraction(1, 2))
    assert (Clip(half).extent(Reading()).width, Clip(half).extent(Reading()).height) == (32, 64)


def notes(found: Dataset, text: str) -> list[str]:
    return [note for note in found.notes if text in note]


def test_a_shorter_clip_takes_the_next_shorter_length(tmp_path: Path) -> None:
    for frames in (3, 5, 8, 9, 20):
        clip(tmp_path / f"{frames:02}.mkv", frames)
    picture(tmp_path / "still.png", (32, 32))
    found = data(tmp_path)
    assert [sample.bucket.frames for sample in found.samples] == [1, 5, 5, 9, 9, 1]
    assert [tuple(found.pixels(number).shape) for number in (0, 1, 4, 5)] == [
        (3, 1, 32, 32),
        (3, 5, 32, 32),
        (3, 9, 32, 32),
        (3, 1, 32, 32),
    ]
    assert notes(found, "shorter") == [
        "03.mkv: shorter than 9 frames, trained with 1",
        "05.mkv, 08.mkv: shorter than 9 frames, trained with 5",
    ]
    assert notes(found, "an image") == ["still.png: an image, trained as a clip of one frame"]
    assert found.pixels(4)[0, :, 0, 0].tolist() == pytest.approx([8 * n / 127.5 - 1 for n in range(9)], abs=0.02)


LONG = Format(32, 32, multiple=16, frames=9, takes_frames=lambda frames: frames >= 5 and frames % 4 == 1)


def test_a_clip_that_is_too_short_is_left_out_by_name(tmp_path: Path) -> None:
    clip(tmp_path / "long.mkv", 6)
    clip(tmp_path / "short.mkv", 3)
    picture(tmp_path / "still.png", (32, 32))
    found = data(tmp_path, LONG)
    assert [sample.item.name for sample in found.samples] == ["long.mkv"]
    assert notes(found, "left out") == [
        "left out, as the model takes no clip of so few frames: short.mkv (3), still.png (1)"
    ]
    (tmp_path / "long.mkv").unlink()
    with pytest.raises(InputError, match=r"^no sample is long enough for this model: short\.mkv \(3\), still\.png "):
        data(tmp_path, LONG)


def test_clips_for_a_model_of_pictures(tmp_path: Path) -> None:
    clip(tmp_path / "a.gif", 3)
    with pytest.raises(InputError, match=r"^a\.gif is a clip, and this model makes images; take clips out of the data"):
        data(tmp_path, PICTURES)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_clip_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mp4", 30, size=(64, 64)).read_bytes()
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        track: Any = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(track.encode(silence))
        container.mux(track.encode(None))
    broken = [
        write(tmp_path / "empty.mp4", b""),
        write(tmp_path / "text.mp4", b"hello" * 100),
        write(tmp_path / "head.mp4", whole[:100]),
        write(tmp_path / "no_end.mp4", whole[:-200]),
        write(tmp_path / "picture.gif", b"GIF89a"),
        sound,
        tmp_path / "gone.mkv",
    ]
    for path in broken:
        with pytest.raises(InputError) as raised:
            Clip(path).extent(Reading(9))
        assert str(raised.value).startswith(f"clip {path} cannot be read: "), raised.value
        assert "\n" not in str(raised.value)


def test_a_clip_that_ends_early_is_named(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mkv", 20, size=(64, 64))
    write(path, path.read_bytes()[:-300])
    assert data(tmp_path).pixels(0).shape[1] == 9
    with pytest.raises(InputError, match=r"a\.mkv cannot be read: 1\d frames can be decoded, of 20 that it lists"):
        Clip(path).read(Reading(20), 32, 32, 20)


def test_pixels_are_floats_from_minus_one_to_one(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[0, 255, 128]]], np.uint8)).save(tmp_path / "a.png")
    pixels = data(tmp_path, PICTURES, resolution="1x1").pixels(0)
    assert pixels.dtype == torch.float32
    assert pixels.flatten().tolist() == [-1, 1, pytest.approx(128 / 127.5 - 1, abs=1e-6)]
    assert pixels.is_contiguous()
