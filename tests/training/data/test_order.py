"""Micro-batches are a pure function of the step; each sample comes once per epoch and repeat."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from shardit.training.data.order import Batch, Draw, Order

SHAPES = ["wide", "square", "wide", "tall", "square"]
"""Five pictures in three shapes."""


def order(buckets: list[Any] = SHAPES, **more: Any) -> Order:
    names = [f"{number}.png" for number in range(len(buckets))]
    return Order(names, buckets, **{"batch_size": 2, "seed": 0, **more})


def draws(batches: list[Batch]) -> list[Draw]:
    return [draw for batch in batches for draw in batch.draws]


def epoch(made: Order, number: int = 0) -> list[Batch]:
    return [made.at(number * made.per_epoch + place) for place in range(made.per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_few_items_in_many_shapes(batch_size: int, repeats: int) -> None:
    made = order(batch_size=batch_size, repeats=repeats)
    for number in range(3):
        found = epoch(made, number)
        assert Counter(draw.name for draw in draws(found)) == {f"{n}.png": repeats for n in range(5)}
        assert {(draw.name, draw.repeat) for draw in draws(found)} == set(
            itertools.product((f"{n}.png" for n in range(5)), range(repeats))
        )
        assert all({SHAPES[draw.item] for draw in batch.draws} == {batch.bucket} for batch in found)
        short = Counter(batch.bucket for batch in found if len(batch.draws) < batch_size)
        assert not short or max(short.values()) == 1  # the last one of a bucket at most
    assert sum(map(len, (batch.draws for batch in epoch(made)))) == 5 * repeats  # what the micro-batches weigh


@settings(max_examples=60, deadline=None)
@given(
    some.lists(some.integers(0, 3), min_size=1, max_size=12),
    some.integers(1, 5),
    some.integers(1, 3),
    some.integers(1, 3),
    some.integers(1, 4),
    some.integers(0, 2**63 - 1),
)
def test_replicas_share_one_stream(
    buckets: list[int], batch_size: int, repeats: int, replicas: int, accumulation: int, seed: int
) -> None:
    made = order(buckets, batch_size=batch_size, repeats=repeats, seed=seed, caption_dropout=0.5)
    again = order(buckets, batch_size=batch_size, repeats=repeats, seed=seed, caption_dropout=0.5)
    stream = [
        batch
        for step in range(5)
        for replica in range(replicas)
        for batch in made.step(step, replica, replicas, accumulation)
    ]
    assert len(stream) == 5 * replicas * accumulation  # the same number for all, whatever the data
    # One rank with as many micro-batches; from any step on; asked in any order.
    one_rank = [batch for step in reversed(range(5)) for batch in again.step(step, 0, 1, replicas * accumulation)[::-1]]
    assert one_rank == stream[::-1]
    assert [again.at(number) for number in range(len(stream))] == stream
    seeds = [draw.seed for draw in draws(stream)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= one < 2**63 for one in seeds)
    assert Counter((draw.name, draw.epoch, draw.repeat) for draw in draws(stream)).most_common(1)[0][1] == 1


def test_replicas_draw_differently() -> None:
    made = order([0] * 8, batch_size=1)
    two = [made.step(3, replica, 2, 2) for replica in range(2)]
    one = made.step(3, 0, 1, 4)
    assert [*two[0], *two[1]] == one
    assert len({draw.seed for draw in draws(one)}) == 4


def test_one_picture() -> None:
    made = order([0], batch_size=4, repeats=3)
    assert made.per_epoch == 1
    found = made.step(0, 1, 2, 3)
    assert [len(batch.draws) for batch in found] == [3, 3, 3]
    assert len({draw.seed for draw in draws(found)}) == 9
    assert [draw.epoch for draw in draws(found)] == [3, 3, 3, 4, 4, 4, 5, 5, 5]


def test_epochs_differ_and_seeds_decide() -> None:
    made = order([0] * 20, batch_size=4)
    orders = [tuple(draw.name for draw in draws(epoch(made, number))) for number in range(3)]
    other = tuple(draw.name for draw in draws(epoch(order([0] * 20, batch_size=4, seed=1))))
    assert len({*orders, other}) == 4
    # Recorded: a run that resumes with a later version goes on with the same samples.
    assert [(draw.name, draw.seed) for draw in draws([order().at(0), order().at(7)])] == RECORDED


RECORDED = [("3.png", 4249540925523536349), ("2.png", 6583623767197218881), ("0.png", 4998570881619460366)]


def test_seeds_go_by_name() -> None:
    few = {draw.name: draw.seed for draw in draws(epoch(order([0] * 3)))}
    many = {draw.name: draw.seed for draw in draws(epoch(order([0] * 9)))}
    assert few.items() <= many.items()


def test_share_of_dropped_captions() -> None:
    made = order([0] * 100, batch_size=10, caption_dropout=0.3, repeats=2)
    found = [draw for number in range(10) for draw in draws(epoch(made, number))]
    assert sum(draw.drop_caption for draw in found) / len(found) == pytest.approx(0.3, abs=0.04)
    always = {draw.name for draw in found} - {draw.name for draw in found if not draw.drop_caption}
    assert not always  # others in each epoch
    assert not any(draw.drop_caption for draw in draws(epoch(order([0] * 50))))
    assert all(draw.drop_caption for draw in draws(epoch(order([0] * 50, caption_dropout=1.0))))
    # The seed of the noise is the same with and without.
    plain = {(draw.name, draw.seed) for draw in draws(epoch(order()))}
    assert plain == {(draw.name, draw.seed) for draw in draws(epoch(order(caption_dropout=1.0)))}


def test_once() -> None:
    made = order(batch_size=2, repeats=4, caption_dropout=1.0, seed=5)
    found = made.once()
    assert [[draw.name for draw in batch.draws] for batch in found] == [
        ["0.png", "2.png"],
        ["1.png", "4.png"],
        ["3.png"],
    ]
    assert found == made.once()
    assert not any(draw.drop_caption for draw in draws(found))
    assert len({draw.seed for draw in draws(found)}) == 5
    assert not {draw.seed for draw in draws(found)} & {draw.seed for draw in draws(epoch(made))}


def test_table() -> None:
    assert order(repeats=3, batch_size=4).table() == [("wide", 2, 2, 2), ("square", 2, 2, 2), ("tall", 1, 1, 3)]
    assert order().per_epoch == 3


def test_large_data_are_quick() -> None:
    made = order([number % 7 for number in range(100_000)], batch_size=3)
    first = made.at(0)
    assert made.at(made.per_epoch - 1).draws
    assert made.at(0) == first
