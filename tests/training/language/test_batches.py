"""The stream of micro-batches: each example once per epoch, like lengths together, padding without labels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from shardit.training.language.batches import IGNORED, LanguageBatches, padded_length
from shardit.training.language.examples import Example


def example(name: str, length: int) -> Example:
    ids = torch.full((length,), 5, dtype=torch.int32)
    ids[-1] = 1
    return Example(name, ids, torch.ones(length, dtype=torch.bool))


def made(count: int = 11, batch_size: int = 4, repeats: int = 1, seed: int = 0) -> LanguageBatches:
    return LanguageBatches(
        [example(f"a:{n}", 3 + n % 9) for n in range(count)], batch_size, repeats, seed, 100, padding=1
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 11])
def test_each_example_is_seen_once_in_each_pass(count: int, repeats: int, batch_size: int) -> None:
    batches, orders = made(count, batch_size, repeats), []
    for epoch in range(3):
        numbers = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        seen = [name for number in numbers for name in batches.numbered(number).items]
        assert Counter(seen) == {f"a:{number}": repeats for number in range(count)}
        orders.append(seen)
    assert batch_size >= count * repeats or count == 1 or orders[0] != orders[1]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_replicas_take_parts_of_one_stream(replicas: int, accumulation: int) -> None:
    batches = made()
    found = [
        one.items
        for step in range(4)
        for replica in range(replicas)
        for one in batches.of_step(step, replica, replicas, accumulation)
    ]
    assert found == [batches.numbered(number).items for number in range(4 * replicas * accumulation)]


def test_a_micro_batch_depends_on_nothing_but_its_number() -> None:
    forward, fresh = made(), made()
    first = [forward.numbered(number).items for number in range(20)]
    assert [fresh.numbered(number).items for number in reversed(range(20))] == first[::-1]
    assert [made(seed=1).numbered(number).items for number in range(20)] != first


def test_like_lengths_share_a_micro_batch() -> None:
    batches = made(count=400, batch_size=4)
    spreads = [
        max(lengths) - min(lengths)
        for number in range(batches.per_epoch)
        if (lengths := [3 + int(name[2:]) % 9 for name in batches.numbered(number).items])
    ]
    assert max(spreads) <= 1
    lengths = [batches.numbered(number).data["ids"].shape[1] for number in range(batches.per_epoch)]
    assert lengths != sorted(lengths)


def test_padding_is_masked_by_position() -> None:
    """The token for padding is the end token, which is a label at the end of each example."""
    batches = LanguageBatches([example("a:1", 3), example("a:2", 12)], 2, 1, 0, 100, padding=1)
    batch = batches.numbered(0)
    assert batch.data["ids"].shape == (2, 16)
    by_name = dict(zip(batch.items, batch.data["labels"].tolist(), strict=True))
    assert by_name["a:1"] == [5, 5, 1] + [IGNORED] * 13
    assert by_name["a:2"] == [5] * 11 + [1] + [IGNORED] * 4
    assert batch.weight == 2 + 11
    assert batches.all_once()[0].items == ("a:1", "a:2")


def test_lengths_are_few_and_near() -> None:
    lengths = [padded_length(length) for length in range(1, 4097)]
    assert all(length <= padded <= max(length + 7, length * 9 / 8 + 1) for length, padded in enumerate(lengths, 1))
    assert len(set(lengths)) < 60
    assert LanguageBatches([example("a:1", 99)], 1, 1, 0, 99, 1).numbered(0).data["ids"].shape == (1, 99)
