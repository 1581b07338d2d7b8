"""`Dataset`: the data of a run as sized samples with captions, their pixels, and the order of micro-batches."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardit.errors import InputError, listed
from shardit.training.data.buckets import Bucket, Format, bucket_of, frames_asked, sizes_asked
from shardit.training.data.identity import ITEMS, item_identity
from shardit.training.data.items import FoundItems, Item, count
from shardit.training.data.media import Extent, Reading
from shardit.training.data.order import Order
from shardit.training.data.sources.find import find_items
from shardit.training.settings import TrainSettings

_LEFT_OUT = 20
"""Names of samples that are left out in one note."""

_LOST = 1 / 3
"""Share of an image above which its cut is noted."""


@dataclass(frozen=True)
class Sample:
    """An item and the size and length that it is brought to."""

    item: Item
    bucket: Bucket


@dataclass(frozen=True)
class Dataset:
    """Samples of a run, for training or validation."""

    samples: tuple[Sample, ...]
    """In the order of their names; `Draw.item` counts among them."""
    order: Order
    notes: tuple[str, ...]
    """For the user: oddities, what is left out, a table of the buckets."""
    settings: Mapping[str, Any]
    """Those that decide the micro-batches, by name."""
    _reading: Reading
    _videos: bool

    def pixels(self, number: int) -> Tensor:
        """Return the pixels of a sample as float32 from -1 to 1: (channels, frames, height, width) for a model of
        videos, (channels, height, width) for one of images. Raises InputError, which names the file."""
        sample = self.samples[number]
        bucket = sample.bucket
        read = sample.item.media.read(self._reading, bucket.width, bucket.height, bucket.frames)
        frames = torch.from_numpy(read).permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        frames = frames.div_(127.5).sub_(1)
        return frames if self._videos else frames[:, 0]

    def key(self, number: int) -> str:
        """Return a digest of all that decides the pixels of a sample, as a part of the name of what is made of them."""
        sample = self.samples[number]
        parts = (sample.item.media.digest(), sample.bucket, self._reading.fps, self._reading.background, self._videos)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what decides the micro-batches: the samples by name and the settings. Reads all files."""
        items = {sample.item.name: item_identity(sample.item, sample.bucket) for sample in self.samples}
        return {ITEMS: items, **self.settings}


def open_dataset(settings: TrainSettings, format: Format, *, held_out: bool = False) -> Dataset:
    """Return the data that the settings name, at sizes and lengths that a model takes. Raises InputError.

    held_out: the data of validation, each sample once with its caption (`Order.once`).
    """
    frames = frames_asked(settings.num_frames, settings.fps, format)
    reading = Reading(frames, settings.fps, settings.background)
    sizes = sizes_asked(settings.resolution, format)
    found = find_items(settings.validation_data if held_out else settings.data, held_out=held_out)
    samples, notes = _samples(found, reading, sizes, format)
    order = Order(
        [sample.item.name for sample in samples],
        [sample.bucket for sample in samples],
        batch_size=settings.batch_size,
        seed=settings.seed,
        repeats=1 if held_out else settings.repeats,
        caption_dropout=0.0 if held_out else settings.caption_dropout,
    )
    decide = ("seed", "batch_size", "repeats", "caption_dropout", "fps", "background")
    chosen = {name: getattr(settings, name) for name in decide}
    return Dataset(tuple(samples), order, (*notes, *_table(order)), chosen, reading, format.frames is not None)


def _samples(
    found: FoundItems, reading: Reading, sizes: list[tuple[int, int]], format: Format
) -> tuple[list[Sample], list[str]]:
    """Bring items to their buckets. Returns the samples, and notes."""
    samples: list[Sample] = []
    by_note: dict[str, list[str]] = defaultdict(list)
    left_out: list[str] = []
    for item in found.items:
        if item.media.moving and format.frames is None:
            raise InputError(
                f"{item.name} is a clip, and this model makes images; take clips out of the data (of drawn shapes, "
                "use shapes:still)"
            )
        extent = item.media.extent(reading)
        bucket = bucket_of(extent, sizes, format)
        if bucket is None:
            left_out.append(f"{item.name} ({extent.frames})")
            continue
        samples.append(Sample(item, bucket))
        for note in (*extent.notes, *_changes(item, extent, bucket, reading)):
            by_note[note].append(item.name)
    notes = [*found.notes, *(f"{listed(names)}: {note}" for note, names in by_note.items())]
    if left_out:
        notes.append(f"left out, as the model takes no clip of so few frames: {listed(left_out, _LEFT_OUT)}")
    if not samples:
        raise InputError(f"no sample is long enough for this model: {listed(left_out)} frames")
    return samples, notes


def _changes(item: Item, extent: Extent, bucket: Bucket, reading: Reading) -> list[str]:
    """Return notes on what a sample loses in its bucket."""
    notes = []
    if item.media.moving and bucket.frames < reading.frames:
        notes.append(f"shorter than {reading.frames} frames, trained with {bucket.frames}")
    elif not item.media.moving and reading.frames > 1:
        notes.append("an image, trained as a clip of one frame")
    if not extent.width:
        return notes
    wide, high = extent.width / bucket.width, extent.height / bucket.height
    if min(wide, high) < 1:
        notes.append(f"smaller than {bucket.width}x{bucket.height}, enlarged")
    if min(wide, high) / max(wide, high) < 1 - _LOST:
        notes.append(f"more than a third is cut off in {bucket.width}x{bucket.height}")
    return notes


def _table(order: Order) -> Sequence[str]:
    rows = order.table()
    total = count(sum(samples for _, samples, _, _ in rows), "sample", "samples")
    lines = [f"data: {total} in {count(len(rows), 'bucket', 'buckets')}, {_batches(order.per_epoch)} in an epoch"]
    for bucket, samples, batches, last in sorted(rows):
        short = f" of {last}" if last < order.batch_size else ""
        ending = f", the last one{short}" if short and batches > 1 else short
        lines.append(f"  {bucket}: {count(samples, 'sample', 'samples')}, {_batches(batches)}{ending}")
    return lines


def _batches(number: int) -> str:
    return count(number, "micro-batch", "micro-batches")
