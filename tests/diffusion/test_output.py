"""Pictures in, pictures and videos out."""

import io
import json
import os
import pickle
import subprocess
import sys

import av
import numpy as np
import pytest
from diffusers.utils import load_video
from PIL import Image
from safetensors.numpy import load_file

from shardit.diffusion.output.encode import write_video
from shardit.diffusion.output.from_file import read_record
from shardit.diffusion.output.output import Output
from shardit.diffusion.output.target import check_path
from shardit.diffusion.request.image_arguments import open_images
from shardit.diffusion.request.images import image_notes, open_image, open_video
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.errors import InputError
from shardit.training.data import shapes

SETTINGS = {"pipeline": "FakePipeline", "width": 16, "height": 12, "guidance_scale": 4.0}


def noise(width=16, height=12, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values)


def pictures(count=1, **options):
    return Output(prompt="a 猫", seed=5, images=[noise(seed=i, **options) for i in range(count)], settings=SETTINGS)


def video(count=1, width=16, height=12, frames=5):
    ramp = np.linspace(0, 255, width * height, dtype=np.uint8).reshape(height, width)
    picture = np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], axis=2)
    clips = [[Image.fromarray(np.roll(picture, i, axis=1)) for i in range(frames)] for _ in range(count)]
    return Output(prompt="a 猫", seed=5, frames=clips, fps=12.5, settings=SETTINGS)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_png_holds_pixels_and_settings(tmp_path):
    output = pictures()
    assert output.save(tmp_path / "cat.png") == [tmp_path / "cat.png"]
    with Image.open(tmp_path / "cat.png") as read:
        assert np.array_equal(np.asarray(read), np.asarray(output.images[0]))
        assert read.text["seed"] == "5"
        assert read.text["prompt"] == "a 猫"
        record = json.loads(read.text["settings"])
    made = {"width": 16, "height": 12}
    assert record == {"software": "shardit", "prompt": "a 猫", "seed": 5, "made": made, **SETTINGS}


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_other_formats_hold_settings(tmp_path, suffix):
    output = pictures()
    (path,) = output.save(tmp_path / f"cat{suffix}")
    with Image.open(path) as read:
        assert json.loads(read.getexif()[0x010E])["seed"] == 5
        assert read.size == (16, 12)
        if suffix == ".webp":
            assert np.array_equal(np.asarray(read), np.asarray(output.images[0]))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_quality_makes_files_smaller(tmp_path, suffix):
    output = pictures(width=64, height=64)
    sizes = [output.save(tmp_path / f"{q}{suffix}", quality=q)[0].stat().st_size for q in (0, 50, 100, None)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


def test_frame_rate_of_a_file(tmp_path):
    picture = Image.new("RGB", (16, 16))
    video = Output(prompt="a", seed=1, frames=[[picture] * 6], fps=24, settings={"model": "m"})
    for fps, rate in ((3, 3), (None, 24)):
        (path,) = video.save(tmp_path / "a.mp4", fps=fps)
        with av.open(path) as file:
            assert file.streams.video[0].average_rate == rate
        assert read_record(path)["fps"] == rate
    assert video.fps == 24
    for fps, name, says in (
        (0, "a.mp4", "fps must be"),
        ("3", "a.mp4", "fps must be"),
        (3, "a.png", "fps is of videos"),
    ):
        with pytest.raises(InputError, match=says):
            Output(prompt="a", seed=1, images=[picture], frames=[[picture]]).save(tmp_path / name, fps=fps)


@pytest.mark.parametrize(
    ("quality", "suffix"), [(-1, ".jpg"), (101, ".jpg"), ("high", ".webp"), (50, ".png"), (1, ".mp4")]
)
def test_quality_is_checked(tmp_path, quality, suffix):
    output = video() if suffix == ".mp4" else pictures()
    with pytest.raises(InputError, match="quality"):
        output.save(tmp_path / f"cat{suffix}", quality=quality)
    assert files(tmp_path) == []


def test_endless_prompt_fits_a_jpeg(tmp_path):
    output = Output(prompt="x" * 100_000, seed=5, images=[noise()])
    (path,) = output.save(tmp_path / "cat.jpg")
    with Image.open(path) as read:
        assert json.loads(read.getexif()[0x010E])["seed"] == 5


def test_transparency(tmp_path):
    output = pictures(mode="RGBA")
    for name in ("layer.png", "layer.webp"):
        (path,) = output.save(tmp_path / name)
        with Image.open(path) as read:
            assert np.array_equal(np.asarray(read), np.asarray(output.images[0]))
    with pytest.raises(InputError, match="lose transparency"):
        output.save(tmp_path / "layer.jpg")


def test_several_are_numbered(tmp_path):
    written = pictures(3).save(tmp_path / "cat.png")
    assert [path.name for path in written] == ["cat-0.png", "cat-1.png", "cat-2.png"]
    assert [path.name for path in video(2).save(str(tmp_path / "cat.mp4"))] == ["cat-0.mp4", "cat-1.mp4"]
    assert files(tmp_path) == ["cat-0.mp4", "cat-0.png", "cat-1.mp4", "cat-1.png", "cat-2.png"]


@pytest.mark.parametrize(("width", "height"), [(16, 12), (17, 13), (16, 13), (1, 1)])
def test_video(tmp_path, width, height):
    output = video(width=width, height=height)
    (path,) = output.save(tmp_path / "cat.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        assert json.loads(container.metadata["comment"])["seed"] == 5
        assert json.loads(container.metadata["comment"])["prompt"] == "a 猫"
        frames = [frame.reformat(format="rgb24", src_colorspace="ITU709") for frame in container.decode(stream)]
    assert len(frames) == 5
    assert (frames[0].width, frames[0].height) == (width + width % 2, height + height % 2)
    if width > 1:
        # What is wrong in colour space or range is off by 10 and more; compression and halved chroma by less.
        for frame, original in zip(frames, output.frames[0], strict=True):
            pixels = frame.to_ndarray()[:height, :width].astype(int)
            assert abs(pixels.mean(axis=(0, 1)) - np.asarray(original).mean(axis=(0, 1))).max() < 6


@pytest.mark.parametrize(
    ("made", "name", "says"),
    [
        (Output("a", 1, images=[Image.new("RGB", (16384, 1))]), "a.webp", "at most 16383 pixels in width, got 16384"),
        (Output("a", 1, images=[Image.new("RGB", (1, 65501))]), "a.jpg", "at most 65500 pixels in height, got 65501"),
        (Output("a", 1, frames=[[Image.new("RGB", (16386, 2))]]), "a.mp4", "at most 16384 pixels in width, got 16386"),
        (Output("a", 1, frames=[[Image.new("RGB", (2, 2))]], fps=1e-9), "a.mp4", "fps must be at least 0.01"),
        (Output("a", 1, frames=[[Image.new("RGB", (2, 2))]], fps=1e12), "a.mp4", "fps must be at most 1000"),
        (Output("a", 1, audio=np.zeros((1, 1, 9), "f4"), sample_rate=2**31), "a.wav", "sample_rate must be"),
        (Output("a", 1, audio=np.zeros((1, 1, 0), "f4"), sample_rate=8000), "a.wav", "the sound has no samples"),
        (Output("a", 1, audio=np.zeros((0, 1, 9), "f4"), sample_rate=8000), "a.wav", "nothing to save"),
        (Output("a", 1, images=[Image.new("F", (2, 2))]), "a.webp", "use .safetensors"),
        (Output("a", 1, images=[Image.new("LA", (2, 2))]), "a.jpg", "would lose transparency; use .png"),
        (Output("a", 1, images=[Image.new("L", (2, 2))]), f"{'a' * 300}.png", "is too long"),
        (
            Output("a", 1, extra={"a.b": np.zeros(2), "a": {"b": np.zeros(2)}}),
            "a.safetensors",
            "two results are called a.b",
        ),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, made, name, says):
    with pytest.raises(InputError, match=says):
        made.save(tmp_path / name)
    assert files(tmp_path) == []


def test_pictures_of_any_mode_are_saved(tmp_path):
    for mode, suffix in (("P", ".jpg"), ("CMYK", ".png"), ("LA", ".webp"), ("1", ".webp"), ("PA", ".png")):
        [path] = Output("a", 1, images=[Image.new(mode, (2, 2))]).save(tmp_path / f"{mode}{suffix}")
        assert Image.open(path).size == (2, 2)


def test_half_characters_are_saved_escaped(tmp_path):
    [path] = Output("caf\udce9", 1, images=[noise()], settings={"model": "m"}).save(tmp_path / "a.png")
    assert Image.open(path).text["prompt"] == "caf\\udce9"
    assert read_record(path)["prompt"] == "caf\udce9"
    [path] = Output("a", 1, texts=["caf\udce9"]).save(tmp_path / "a.txt")
    assert path.read_text() == "caf\\udce9"


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    made = Output("a", 1, extra={"words": np.array(["x"]), "wide": np.array([1], np.longdouble), "some": np.zeros(2)})
    [path] = made.save(tmp_path / "a.safetensors")
    assert load_file(path).keys() == {"some"}
    assert made.left_out(path) == ["words", "wide"]


def test_existing_file_is_replaced(tmp_path):
    path = tmp_path / "cat.png"
    path.write_text("old")
    pictures().save(path)
    assert Image.open(path).size == (16, 12)
    assert files(tmp_path) == ["cat.png"]


def test_the_file_of_a_link_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for target, link in (("there/cat.png", "link.png"), ("there/plain", "other.png")):
        (tmp_path / link).symlink_to(target)
        assert pictures().save(tmp_path / link) == [tmp_path / link]
        assert (tmp_path / link).is_symlink()
        assert Image.open(tmp_path / target).size == (16, 12)
    assert files(tmp_path / "there") == ["cat.png", "plain"]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to(os.devnull)
    (tmp_path / "lost.png").symlink_to("none/cat.png")
    for name, message in {"pipe": "not a regular file", "null": "not a regular file", "lost": "none does not"}.items():
        with pytest.raises(InputError, match=message):
            pictures().save(tmp_path / f"{name}.png")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("cat.mp4", "image", "does not fit an image; use an extension among .png"),
        ("cat.png", "video", "does not fit a video; use an extension among .mp4"),
        ("cat", None, "does not fit"),
        ("cat.doc", None, "does not fit"),
        ("none/cat.png", None, "none does not exist; make it or choose another"),
        ("file/cat.png", None, "file is not a folder; choose another"),
        ("folder.png", None, "is a folder; give a file name"),
        (".", None, "is a folder; give a file name"),
    ],
)
def test_path_is_checked(tmp_path, name, kind, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=message) as error:
        check_path(tmp_path / name, kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [None, 5, b"cat.png", ["cat.png"]])
def test_values_that_are_not_paths(path):
    for use in (pictures().save, check_path):
        with pytest.raises(InputError, match="output must be a path"):
            use(path)


def test_path_that_fits(tmp_path):
    assert check_path(tmp_path / "cat.MP4", "video") == tmp_path / "cat.MP4"
    assert check_path(str(tmp_path / "cat.png")) == tmp_path / "cat.png"


def test_pictures_and_videos_as_numbers(tmp_path):
    red, blue = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
    made = Output(prompt="a", seed=1, images=[red, blue], settings={"width": 6, "model": "m"})
    [path] = made.save(tmp_path / "a.safetensors")
    assert load_file(path)["images"].shape == (2, 4, 6, 3)
    assert load_file(path)["images"][1].tolist() == [[[0, 0, 255]] * 6] * 4
    assert made.left_out(path) == []
    assert read_record(path)["width"] == 6
    [path] = Output(prompt="a", seed=1, frames=[[red, blue, red]]).save(tmp_path / "b.safetensors")
    assert load_file(path)["frames.0"].shape == (3, 4, 6, 3)
    [path] = Output(prompt="a", seed=1, images=[red, Image.new("RGBA", (2, 2))]).save(tmp_path / "c.safetensors")
    assert {name: array.shape for name, array in load_file(path).items()} == {
        "images.0": (4, 6, 3),
        "images.1": (2, 2, 4),
    }


def test_the_extension_is_compared_with_the_output_type():
    takes = PipelineSignature("P", ("prompt",))
    assert takes.kinds_as(None) == ("image", "tensors")
    assert takes.kinds_as("latent") == ("tensors",)
    with pytest.raises(InputError, match=r"does not fit numbers; use an extension among \.safetensors"):
        check_path("f.png", takes.kinds_as("latent"))


def test_error_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="the request failed: height must be divisible by 16"):
        Output(prompt="a", seed=1, error="height must be\ndivisible by 16").save(tmp_path / "cat.png")
    with pytest.raises(InputError, match="holds no images"):
        Output(prompt="a", seed=1, latents=object()).save(tmp_path / "cat.png")
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg", "cat.webp", "cat.mp4"])
@pytest.mark.parametrize("missing", ["half", "one"])
def test_full_disk_leaves_nothing(tmp_path, name, missing):
    """A limit on the size of files stands in for the disk: writing fails in the same place, with an error like it."""
    code = f"""
import os, resource, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_output import pictures, video
from pathlib import Path
output = video(width=64, height=48) if {name!r}.endswith("mp4") else pictures(width=64, height=48)
path = Path({str(tmp_path)!r}, {name!r})
size = output.save(path)[0].stat().st_size
path.unlink()
resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1 if {missing!r} == "one" else size // 2, resource.RLIM_INFINITY))
try:
    output.save(path)
except Exception as error:
    print(type(error).__name__, error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.startswith("InputError output"), ran.stderr
    assert ran.stdout.strip().endswith("File too large; free space or choose another folder")
    assert files(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pictures(2).save(tmp_path / "cat.png")
    assert files(tmp_path) == []


def test_notes_tell_what_was_rounded():
    assert pictures().notes == []
    rounded = Output(prompt="a", seed=1, images=[noise()], settings={"width": 20, "height": 12})
    assert rounded.notes == ["width: asked for 20, the pipeline made 16"]
    clip = Output(prompt="a", seed=1, frames=[[noise()] * 5], settings={"num_frames": 6})
    assert clip.notes == ["num_frames: asked for 6, the pipeline made 5"]


def test_output_travels():
    again = pickle.loads(pickle.dumps(pictures(mode="RGBA")))
    assert again.seed == 5
    assert again.images[0].tobytes() == noise(mode="RGBA").tobytes()


def encoded(picture, image_format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_image_sources_agree(tmp_path):
    picture = noise()
    path = tmp_path / "in.png"
    picture.save(path)
    for source in (path, str(path), path.read_bytes(), picture):
        assert open_image(source).tobytes() == picture.tobytes()
    assert open_image(picture) is not picture


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(image_format):
    picture = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if image_format == "WEBP" else {}
    upright = open_image(encoded(picture, image_format, exif=exif, **options))
    assert upright.size == (4, 8)
    assert upright.info == {}


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_that_are_not_used_are_noted(image_format):
    first, second = Image.new("RGB", (8, 4), "white"), Image.new("RGB", (8, 4), "black")
    animation = encoded(first, image_format, save_all=True, append_images=[second])
    assert image_notes({"image": open_image(animation)}) == ["image: the first of its 2 frames was used"]
    photo = encoded(first, "MPO", save_all=True, append_images=[second])  # others are previews, or of other lenses
    assert image_notes({"image": open_image(photo)}) == []


def test_pipes_are_read_if_they_are_open_and_refused_if_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png is a named pipe, not a regular file; choose another"):
        open_image(tmp_path / "pipe.png")
    read, write = os.pipe()  # as of <(command) in a shell
    os.write(write, encoded(Image.new("RGB", (8, 4), "white"), "PNG"))
    os.close(write)
    try:
        assert open_image(f"/dev/fd/{read}").size == (8, 4)
    finally:
        os.close(read)


def test_transparency_goes_on_white_or_stays():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(half).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert open_image(half, "RGBA").getpixel((0, 0)) == (255, 0, 0, 128)
    assert open_image(Image.new("RGB", (2, 2), "red"), "RGBA").getpixel((0, 0)) == (255, 0, 0, 255)
    assert open_image(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    given = {"image": [open_image(one) for one in (half, half, Image.new("RGBA", (2, 2), "red"))], "steps": 3}
    assert image_notes(given) == ["image: its transparent pixels were put on white"]
    assert image_notes({"a": open_image(half, "RGBA"), "b": open_image(half, "opaque")}) == []
    assert open_image(clear, "opaque").getpixel((0, 0)) == (255, 0, 0)
    assert open_image(Image.new("LA", (2, 2), (0, 0)), "opaque").getpixel((0, 0)) == (0, 0, 0)


def test_strokes_of_masks_stay_on_black():
    mask = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    takes = PipelineSignature(
        "Inpaint", ("image", "mask_image", "ip_adapter_image"), images=("mask_image", "ip_adapter_image")
    )
    given = dict.fromkeys(("mask_image", "ip_adapter_image"), encoded(mask, "PNG"))
    found = open_images(given, takes)
    assert [found["mask_image"].getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]
    assert [found["ip_adapter_image"].getpixel((x, 0))[0] for x in (0, 1)] == [255, 255]


def test_palette_with_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    data = encoded(picture, "PNG", transparency=1)
    assert [open_image(data).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert open_image(data, "RGBA").getpixel((1, 0))[3] == 0


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for source in (encoded(Image.fromarray(values), "PNG"), Image.fromarray(values.astype(np.int32))):
        grey = [open_image(source).getpixel((x, 0)) for x in range(4)]
        assert grey == [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]


def test_whole_numbers_of_32_bits():
    dark = Image.fromarray(np.array([[0, 7, 255]], dtype=np.int32))
    for source in (dark, encoded(dark, "TIFF")):
        assert [open_image(source).getpixel((x, 0))[0] for x in range(3)] == [0, 7, 255]
    for values in ([[0, 65536]], [[-1, 9]]):
        with pytest.raises(InputError, match="values of 32 bits has no defined brightness; save it with 8 bits"):
            open_image(encoded(Image.fromarray(np.array(values, dtype=np.int32)), "TIFF"))


def test_animations_have_the_frames_that_diffusers_reads(tmp_path):
    for seed in range(20):  # ffmpeg leaves out a frame of some of them
        path = tmp_path / f"{seed}.gif"
        frames = [noise(48, 32, seed=100 * seed + number) for number in range(9)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        read = open_video(path if seed % 2 else path.read_bytes())
        expected = [frame.convert("RGB") for frame in load_video(str(path))]
        assert [frame.tobytes() for frame in read] == [frame.tobytes() for frame in expected]


@pytest.mark.parametrize(
    ("form", "codec", "sound"),
    [("matroska", "libx264", 0), ("webm", "libvpx", 0), ("flv", "flv1", 0), ("mp4", "libx264", 6)],
)
def test_a_video_that_was_cut_off(form, codec, sound):
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        images = container.add_stream(codec, rate=16, width=48, height=32, pix_fmt="yuv420p")
        tones = [container.add_stream("aac", rate=8000)] if sound else []
        packets = [p for seed in range(64) for p in images.encode(av.VideoFrame.from_image(noise(48, 32, seed=seed)))]
        for packet in packets + images.encode():
            container.mux(packet)
        for stream in tones:  # longer than the images
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * sound), np.float32), "fltp", "mono")
            silence.sample_rate = 8000
            for packet in stream.encode(silence) + stream.encode():
                container.mux(packet)
    whole = file.getvalue()
    assert len(open_video(whole)) == 64
    if not sound:
        with pytest.raises(InputError, match=r"ends after [\d.]+ s of 4 s: it is cut off; give the whole file"):
            open_video(whole[: len(whole) * 9 // 10])


def test_pictures_given_as_open_files_or_of_other_kinds():
    takes = PipelineSignature("Video", ("video", "mask_image"), images=("video", "mask_image"))
    grey = Image.new("L", (2, 2), 9)
    assert open_images({"video": [grey, grey]}, takes)["video"][1].getpixel((0, 0)) == (9, 9, 9)
    for value in (io.BytesIO(encoded(grey, "PNG")), [io.BytesIO(encoded(grey, "PNG"))]):
        with pytest.raises(InputError, match="mask_image: must be an image, the path of one or a list"):
            open_images({"mask_image": value}, takes)


def test_cmyk_and_black_and_white():
    # JPEG files hold inverted CMYK; read wrongly, red would come out as cyan.
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert open_image(encoded(red, "JPEG")).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)
    assert open_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)


def test_unreadable_images_are_named(tmp_path):
    whole = encoded(noise(64, 64), "PNG")
    contents = {"text.png": b"hello", "empty.png": b"", "cut.png": whole[: len(whole) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "none.png", "."]:
        with pytest.raises(InputError, match=str(tmp_path / name)) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)
    for source in (b"hello", 5, None, "https://example.com/a.png", Image.new("F", (2, 2))):
        with pytest.raises(InputError, match="image"):
            open_image(source)


@pytest.mark.parametrize("size", [64, 200])
def test_the_same_frames_give_the_same_file(size, tmp_path):
    """In 60 files of x264's own settings, one at least was another in nearly each run."""
    frames, _ = shapes.clip(0, width=size, height=size, frames=13)
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
    pictures = [Image.fromarray(frame) for frame in noisy]
    files = set()
    for _ in range(60):
        write_video(pictures, tmp_path / "video.mp4", 16, {})
        files.add((tmp_path / "video.mp4").read_bytes())
    assert len(files) == 1


def test_a_package_that_a_format_needs_is_missed_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("shardit.loading.missing_packages.is_missing", lambda name: name == "av")
    assert check_path(tmp_path / "cat.png", "image")
    with pytest.raises(InputError, match="the module av is not installed; pip install av"):
        check_path(tmp_path / "cat.mp4", "video")
