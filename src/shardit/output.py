"""What a request gives: pictures or videos in memory, and how they become files."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shardit.encode import write_image, write_video
from shardit.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["image", "video"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4",)


@dataclass(frozen=True, eq=False)
class Output:
    """The result of one request."""

    prompt: str | None
    """The prompt, None where embeddings were given."""
    seed: int
    """The seed that was used, given or drawn."""
    images: Sequence[Image] = ()
    """Pictures (for layered pipelines: layers), empty for videos."""
    frames: Sequence[Sequence[Image]] | None = None
    """One list of frames for each video, None for pictures."""
    latents: Any = None
    """The result as numbers: latents before the VAE where output_type="latent" was asked for, pixels for "np" (array)
    and "pt" (tensor)."""
    error: str | None = None
    """Why there is no result, in one line; None where there is one."""
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
        """What differs from what was asked: sizes that the pipeline rounded."""
        pictures = self.frames[0] if self.frames else self.images
        if not pictures:
            return []
        got = {"width": pictures[0].width, "height": pictures[0].height}
        if self.frames:
            got["num_frames"] = len(pictures)
        asked = {name: self.settings.get(name) for name in got}
        return [
            f"{name}: asked for {asked[name]}, the pipeline made {got[name]}"
            for name in got
            if asked[name] is not None and asked[name] != got[name]
        ]

    def save(self, path: str | os.PathLike[str], *, quality: int | None = None) -> list[Path]:
        """Write the pictures (.png, .jpg, .webp) or videos (.mp4); several become name-0.png, name-1.png, ...

        quality: of JPEG and WebP, 0 to 100; None, and 100, for the best there is (95 without colour subsampling, and
        lossless).
        Seed and settings are recorded in the file. Files appear complete or not at all, and existing ones are
        replaced. Returns the paths. Raises `InputError` where this output is an error or holds nothing to save, the
        folder is missing, the extension does not fit or the disk is full.
        """
        if self.error is not None:
            raise InputError(f"nothing to save, the request failed: {_one_line(self.error)}")
        videos, pictures = self.frames or [], self.images or []
        if not videos and not pictures:
            raise InputError("nothing to save, the output holds no pictures; leave out output_type")
        transparent = any(picture.mode == "RGBA" for picture in pictures)
        kind: Kind = "video" if videos else "image"
        target = check_path(path, kind, transparent=transparent)
        record = self.record()
        if videos:
            writers = [_video_writer(frames, self.fps, record) for frames in videos]
        else:
            writers = [_image_writer(picture, record, quality) for picture in pictures]
        targets = [check_path(name, kind) for name in _numbered(target, len(writers))]
        return _write_all(dict(zip(targets, writers, strict=True)))

    def record(self) -> dict[str, Any]:
        """What is written into a file's metadata."""
        rate = {"fps": self.fps} if self.frames else {}
        return {"software": "shardit", "prompt": self.prompt, "seed": self.seed, **rate, **self.settings}


def check_path(path: str | os.PathLike[str], kind: Kind | None = None, *, transparent: bool = False) -> Path:
    """Whether `path` can be written, without writing it, so that nobody waits for a picture that cannot be saved.

    `kind` is what will be saved, None where that is not known yet; `transparent` says that pictures have an alpha
    channel. Returns the path, raises `InputError`.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    fitting = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, None: IMAGE_SUFFIXES + VIDEO_SUFFIXES}[kind]
    if target.is_dir():
        raise InputError(f"output {target} is a folder; give a file name in it, such as {target / 'out'}{fitting[0]}")
    if suffix not in fitting:
        what = f"a {kind}" if kind == "video" else f"an {kind}" if kind else "a picture or video"
        raise InputError(f"output {target} does not fit {what}; use an extension among {', '.join(fitting)}")
    if transparent and suffix in (".jpg", ".jpeg"):
        raise InputError(f"output {target} would lose transparency; use .png or .webp")
    if not target.parent.is_dir():
        what = "is not a folder" if target.parent.exists() else "does not exist; make it"
        raise InputError(f"output folder {target.parent} {what} or choose another")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"output folder {target.parent} is not writable; choose another")
    return target


Writer = Callable[[Path], None]


def _image_writer(picture: Image, record: Mapping[str, Any], quality: int | None) -> Writer:
    return lambda path: write_image(picture, path, record, quality)


def _video_writer(frames: Sequence[Image], fps: float, record: Mapping[str, Any]) -> Writer:
    return lambda path: write_video(frames, path, fps, record)


def _numbered(target: Path, count: int) -> list[Path]:
    if count == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{number}{target.suffix}") for number in range(count)]


def _write_all(writers: Mapping[Path, Writer]) -> list[Path]:
    """Write every file under another name first, so that there are either all of them or none."""
    # Beside the target, because only within one file system is a rename a single step. The suffix stays last:
    # encoders choose the format by it.
    hidden = {path: path.with_name(f".shardit-{secrets.token_hex(6)}{path.suffix}") for path in writers}
    with _removed_on_error(list(hidden.values())):
        for path, write in writers.items():
            with _one_line_os_error(path):
                write(hidden[path])
                _to_disk(hidden[path])
        for path, partial in hidden.items():
            with _one_line_os_error(path):
                os.replace(partial, path)
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
