"""Micro-batches of examples: like lengths share one, and each is a pure function of its number."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from shardit.training.language.examples import Example
from shardit.training.recipe import MicroBatch
from shardit.training.seeds import mixed

MODEL = "model"
"""The name of the trained module of a language model."""

IGNORED = -100
"""The label of a token that is not learnt, as in torch's cross entropy."""

_WINDOW = 64
"""Micro-batches whose examples are sorted by length together: the order of lengths in an epoch stays random."""

_EPOCHS = 2
"""Number of epochs whose order is remembered."""


@dataclass
class LanguageBatches:
    """The stream of micro-batches, epoch after epoch. repeats: times that an epoch has each example. limit: the most
    tokens of an example. padding: a token; any is right, since padding is neither a label nor seen by one."""

    examples: Sequence[Example]
    batch_size: int
    repeats: int
    seed: int
    limit: int
    padding: int
    _orders: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def per_epoch(self) -> int:
        """Return the number of micro-batches in an epoch."""
        return math.ceil(len(self.examples) * self.repeats / self.batch_size)

    def of_step(self, step: int, replica: int, replicas: int, accumulation: int) -> list[MicroBatch]:
        """Return the micro-batches of a replica in an optimizer step: a part of the stream that no other has."""
        first = (step * replicas + replica) * accumulation
        return [self.numbered(number) for number in range(first, first + accumulation)]

    def numbered(self, number: int) -> MicroBatch:
        """Return a micro-batch of the stream."""
        epoch, place = divmod(number, self.per_epoch)
        return self._collated(self._order(epoch)[place])

    def all_once(self) -> list[MicroBatch]:
        """Return micro-batches with each example once, sorted by length."""
        return [self._collated(one) for one in self._by_length(list(range(len(self.examples))))]

    def _order(self, epoch: int) -> list[list[int]]:
        """Return the examples of each micro-batch of an epoch."""
        if epoch not in self._orders:
            draw = random.Random(f"{self.seed}/{epoch}")
            shuffled = mixed([*range(len(self.examples))] * self.repeats, draw)
            size = _WINDOW * self.batch_size
            windows = [self._by_length(shuffled[start : start + size]) for start in range(0, len(shuffled), size)]
            self._orders = dict(list(self._orders.items())[1 - _EPOCHS :])
            self._orders[epoch] = mixed([batch for window in windows for batch in window], draw)
        return self._orders[epoch]

    def _by_length(self, numbers: list[int]) -> list[list[int]]:
        """Divide examples into micro-batches of like lengths; the last one may be short."""
        sorted_ = sorted(numbers, key=lambda number: len(self.examples[number].ids))
        return [sorted_[start : start + self.batch_size] for start in range(0, len(sorted_), self.batch_size)]

    def _collated(self, numbers: list[int]) -> MicroBatch:
        chosen = [self.examples[number] for number in numbers]
        width = min(self.limit, padded_length(max(len(one.ids) for one in chosen)))
        ids, labels = [], []
        for one in chosen:
            own, missing = one.ids.long(), (0, width - len(one.ids))
            ids.append(pad(own, missing, value=self.padding))
            # By position: the token for padding may be the end token, which is a label.
            labels.append(pad(own.masked_fill(~one.learnt, IGNORED), missing, value=IGNORED))
        data = {"ids": torch.stack(ids), "labels": torch.stack(labels)}
        return MicroBatch(MODEL, data, float(sum(one.labels for one in chosen)), tuple(one.name for one in chosen))


def padded_length(length: int) -> int:
    """Return the length that examples are padded to: at most an eighth more, or a multiple of 8. The first micro-batch
    of each length costs more, so there should not be many."""
    step = max(8, 2 ** ((length - 1).bit_length() - 4)) if length > 1 else 8
    return math.ceil(length / step) * step
