"""`Order`: which samples the micro-batches of a step have; a pure function of the step."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shardit.training.seeds import SEEDS, derived, mixed

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """One sample in a micro-batch."""

    item: int
    """Its position among the names that the order was made of."""
    name: str
    epoch: int
    """The pass over the data, from 0."""
    repeat: int
    """Number of the repeat within an epoch, from 0."""
    seed: int
    """For its noise and timestep: another in each epoch and repeat, from 0 to 2**63 - 1."""
    drop_caption: bool
    """Whether it is trained with an empty caption this time."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: samples of one bucket."""

    bucket: Any
    draws: tuple[Draw, ...]


class Order:
    """The endless stream of micro-batches, epoch after epoch.

    In an epoch each sample comes `repeats` times. The micro-batches of a bucket are full but for the last one. Each
    micro-batch follows from its number in the stream alone.
    """

    def __init__(
        self,
        names: Sequence[str],
        buckets: Sequence[Hashable],
        *,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        caption_dropout: float = 0.0,
    ):
        """names: of the samples, each another. buckets: the bucket of each, anything that can be a key."""
        assert names, "an order needs a sample"
        assert len(names) == len(buckets), "each sample has a bucket"
        self._names = names
        self.batch_size = batch_size
        self._seed = seed
        self._repeats = repeats
        self._dropout = caption_dropout
        self._buckets: dict[Hashable, list[int]] = defaultdict(list)
        for number, bucket in enumerate(buckets):
            self._buckets[bucket].append(number)
        self.per_epoch = sum(batches for _, _, batches, _ in self.table())
        """Micro-batches in an epoch."""
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def step(self, step: int, replica: int, replicas: int, accumulation: int) -> list[Batch]:
        """Return the micro-batches of one replica in a step. All numbers count from 0."""
        first = (step * replicas + replica) * accumulation
        return [self.at(first + number) for number in range(accumulation)]

    def at(self, number: int) -> Batch:
        """Return one micro-batch of the stream."""
        epoch, place = divmod(number, self.per_epoch)
        bucket, entries = self._epoch(epoch)[place]
        return Batch(bucket, tuple(self._draw(item, epoch, repeat) for item, repeat in entries))

    def table(self) -> list[tuple[Any, int, int, int]]:
        """Return for each bucket its samples, its micro-batches in an epoch and the samples of the last of these."""
        rows = []
        for bucket, inside in self._buckets.items():
            *full, last = _split(range(len(inside) * self._repeats), self.batch_size)
            rows.append((bucket, len(inside), len(full) + 1, len(last)))
        return rows

    def once(self) -> list[Batch]:
        """Return micro-batches with each sample once, in the order of names, with its caption: for validation."""
        made = []
        for bucket, inside in self._buckets.items():
            for chosen in _split(inside, self.batch_size):
                draws = (Draw(item, self._names[item], 0, 0, self._hash("once", item), False) for item in chosen)
                made.append(Batch(bucket, tuple(draws)))
        return made

    def _shuffled(self, epoch: int) -> list[tuple[Hashable, Sequence[tuple[int, int]]]]:
        """Return the micro-batches of an epoch: bucket, and samples with the number of the repeat."""
        draw = random.Random(f"{self._seed}/{epoch}")
        made: list[tuple[Hashable, Sequence[tuple[int, int]]]] = []
        for bucket, inside in self._buckets.items():
            entries = [(item, repeat) for repeat in range(self._repeats) for item in mixed(inside, draw)]
            made += [(bucket, chosen) for chosen in _split(entries, self.batch_size)]
        return mixed(made, draw)

    def _draw(self, item: int, epoch: int, repeat: int) -> Draw:
        share = self._hash("caption", epoch, repeat, item) / SEEDS
        seed = self._hash("noise", epoch, repeat, item)
        return Draw(item, self._names[item], epoch, repeat, seed, share < self._dropout)

    def _hash(self, purpose: str, *numbers: int) -> int:
        """Return a number from 0 to 2**63 - 1 for a sample, the last of `numbers`. It counts by its name, so that new
        data leave others' numbers as they are."""
        return derived(self._seed, purpose, *numbers[:-1], self._names[numbers[-1]])


def _split(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
