"""The data of a run as a whole: tables, keys, identity; whatever the data are, each sample is trained or named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shardit.errors import InputError
from shardit.training.data.buckets import Format
from shardit.training.data.dataset import Dataset, open_dataset
from shardit.training.data.identity import difference
from shardit.training.data.shapes import captions, drawing
from shardit.training.settings import TrainSettings
from tests.training.data.files import PICTURES, VIDEOS, clip, folder, picture

SIZES = {"a.png": (64, 32), "b.png": (32, 32), "c.png": (60, 30), "d.png": (32, 64), "e.png": (30, 30)}
"""Five pictures in three shapes."""


def data(source: Any, format: Format = PICTURES, **settings: Any) -> Dataset:
    return open_dataset(TrainSettings(data=str(source), **settings), format)


def five(root: Path) -> Path:
    for number, (name, size) in enumerate(SIZES.items()):
        picture(root / name, size, (number * 40, 0, 0))
        (root / name).with_suffix(".txt").write_text(f"picture {name}")
    return root


@pytest.mark.parametrize("batch_size", [2, 4])
def test_five_pictures_in_three_shapes(tmp_path: Path, batch_size: int) -> None:
    found = data(five(tmp_path), Format(32, 32, multiple=16), batch_size=batch_size)
    assert found.notes == (
        "e.png: smaller than 32x32, enlarged",
        "data: 5 samples in 3 buckets, 3 micro-batches in an epoch",
        "  16x32: 1 sample, 1 micro-batch of 1",
        f"  32x16: 2 samples, 1 micro-batch{' of 2' if batch_size == 4 else ''}",
        f"  32x32: 2 samples, 1 micro-batch{' of 2' if batch_size == 4 else ''}",
    )
    steps, replicas, accumulation = 2, 2, 3
    seen = Counter(
        draw.name
        for step in range(steps)
        for replica in range(replicas)
        for batch in found.order.step(step, replica, replicas, accumulation)
        for draw in batch.draws
    )
    epochs = steps * replicas * accumulation // found.order.per_epoch
    assert seen == dict.fromkeys(SIZES, epochs)
    for batch in found.order.step(0, 0, 1, 3):
        shapes = {tuple(found.pixels(draw.item).shape) for draw in batch.draws}
        assert shapes == {(3, batch.bucket.height, batch.bucket.width)}
        assert all(found.samples[draw.item].item.caption == f"picture {draw.name}" for draw in batch.draws)


def test_one_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (32, 32))
    found = data(tmp_path, batch_size=4)
    assert found.notes == (
        "all captions are empty: a.png",
        "data: 1 sample in 1 bucket, 1 micro-batch in an epoch",
        "  32x32: 1 sample, 1 micro-batch of 1",
    )
    assert len(found.order.step(7, 1, 2, 3)) == 3


def test_keys_follow_content_and_size_not_names(tmp_path: Path) -> None:
    root = five(tmp_path / "1")
    keys = {data(root).key(number) for number in range(5)}
    assert len(keys) == 5
    folder(tmp_path / "2", {"other name.png": (root / "a.png").read_bytes()})
    same = data(tmp_path / "2")
    assert same.key(0) == data(root).key(0)
    assert data(tmp_path / "2", background="black").key(0) != same.key(0)
    assert data(tmp_path / "2", resolution="64").key(0) != same.key(0)
    assert data(tmp_path / "2", VIDEOS).key(0) != same.key(0)


def test_files_of_one_size_and_time_that_changed_are_seen(tmp_path: Path) -> None:
    root = five(tmp_path)
    before = data(root)
    first = before.key(0)
    path = root / "a.png"
    written = path.stat().st_mtime_ns
    picture(path, SIZES["a.png"], (1, 2, 3))
    os.utime(path, ns=(written + 1, written + 1))
    assert data(root).key(0) != first


def test_identity_names_what_differs(tmp_path: Path) -> None:
    root = five(tmp_path)
    before = json.loads(json.dumps(data(root).identity()))
    assert difference(before, data(root).identity()) == ""
    assert difference(before, data(root, batch_size=2, seed=3).identity()) == (
        "batch_size was 1 and is 2; seed was 0 and is 3"
    )
    (root / "a.txt").write_text("changed")
    assert difference(before, data(root).identity()) == "a.png has changed its caption"
    (root / "a.txt").write_text("picture a.png\r\n")
    assert difference(before, data(root).identity()) == ""
    assert difference(before, data(root, resolution="64x64").identity()) == (
        "5 items have changed their bucket (a.png, b.png, c.png and 2 more)"
    )
    picture(root / "b.png", SIZES["b.png"], "yellow")
    assert difference(before, data(root).identity()) == "b.png has changed its content"
    picture(root / "c.png", (31, 31), "yellow")
    (root / "d.png").rename(root / "f.png")
    (root / "d.txt").rename(root / "f.txt")
    assert difference(before, data(root).identity()) == (
        "d.png is gone; f.png is new; c.png is another; b.png has changed its content"
    )


def test_copies_have_the_identity_of_the_original(tmp_path: Path) -> None:
    one = five(tmp_path / "one")
    two = folder(tmp_path / "two", {path.name: path.read_bytes() for path in one.iterdir()})
    os.utime(two / "a.png", (1, 1))
    assert data(one).identity() == data(two).identity()


def test_large_clips_are_sampled(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    clip(path, 2)
    content = path.read_bytes() + bytes(5 * 2**20)
    path.write_bytes(content)
    before = data(tmp_path, VIDEOS).key(0)
    path.write_bytes(content + b"\0")
    assert data(tmp_path, VIDEOS).key(0) != before
    path.write_bytes(b"".join([content[:-1], b"\1"]))
    assert data(tmp_path, VIDEOS).key(0) != before


def test_drawn_shapes(tmp_path: Path) -> None:
    moving = Format(48, 32, multiple=16, frames=5, takes_frames=lambda frames: frames % 4 == 1)
    found = data("shapes:moving:12", moving, batch_size=5)
    assert found.notes[-1] == "  48x32, 5 frames: 12 samples, 3 micro-batches, the last one of 2"
    shown = found.pixels(3)
    expected = np.moveaxis(drawing(3).frames(48, 32, 5), -1, 0) / 127.5 - 1
    assert np.abs(shown.numpy() - expected).max() < 1e-6
    assert found.samples[3].item.caption == drawing(3).caption
    assert len({found.key(number) for number in range(12)}) == 12
    still = data("shapes:still", PICTURES)
    assert len(still.samples) == 2000
    assert still.pixels(0).shape == (3, 32, 32)
    with pytest.raises(InputError, match=r"^moving-0000000 is a clip, and this model makes images"):
        data("shapes:moving", PICTURES)
    mixed = data("shapes:still:2", moving)
    assert mixed.pixels(0).shape == (3, 1, 32, 48)


def test_held_out_data() -> None:
    moving = Format(32, 32, multiple=16, frames=5)
    settings = TrainSettings(data="shapes:moving", validation_data="shapes:moving", repeats=3, caption_dropout=1.0)
    found = open_dataset(settings, moving, held_out=True)
    assert len(found.samples) == 64
    held = set(captions(held_out=True))
    assert {sample.item.caption for sample in found.samples} <= held
    assert not {sample.item.caption for sample in data("shapes:moving", moving).samples} & held
    batches = found.order.once()
    assert sum(len(batch.draws) for batch in batches) == 64
    assert found.order.per_epoch == 64


PROCESS = """
import json, sys
from tests.training.data.test_dataset import summary
print(json.dumps(summary(sys.argv[1])))
"""


def summary(root: Any) -> Any:
    """What ranks have to agree on."""
    found = data(root, batch_size=2, repeats=2, caption_dropout=0.5)
    steps = [[repr(batch) for batch in found.order.step(step, 1, 2, 3)] for step in (0, 5)]
    return [steps, found.identity(), float(found.pixels(0).double().sum()), list(found.notes)]


def test_processes_agree(tmp_path: Path) -> None:
    root = five(tmp_path)
    other = subprocess.run(
        [sys.executable, "-c", PROCESS, str(root)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert json.loads(other.stdout) == summary(str(root))


def test_settings_that_decide_are_in_the_identity(tmp_path: Path) -> None:
    root = five(tmp_path)
    base = data(root).identity()
    changes = {"seed": 1, "batch_size": 3, "repeats": 2, "caption_dropout": 0.1, "background": "red"}
    for name, value in changes.items():
        settings = TrainSettings(data=str(root), **{name: value})
        assert open_dataset(settings, PICTURES).identity() != base


def test_a_mix_of_everything(tmp_path: Path) -> None:
    root = five(tmp_path)
    clip(root / "in/f.mkv", 9, size=(64, 32))
    (root / "in/f.txt").write_text("a clip")
    Image.new("P", (20, 40)).save(root / "in/g.gif")
    (root / "in/g.txt").write_text("a still in a file of clips")
    found = data(root, VIDEOS, batch_size=2)
    assert [sample.bucket.frames for sample in found.samples] == [1, 1, 1, 1, 1, 9, 1]
    for batch in found.order.step(0, 0, 1, found.order.per_epoch):
        for draw in batch.draws:
            bucket = batch.bucket
            assert found.pixels(draw.item).shape == (3, bucket.frames, bucket.height, bucket.width)
