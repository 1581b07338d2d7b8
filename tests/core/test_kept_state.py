"""State that a transformer keeps from call to call: as on one rank, or refused on all ranks."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn

from shardit.core.modules.blocks import CutModel
from shardit.core.modules.state.module_state import differences, restore, state_of
from shardit.core.stages.first_call import FirstCalls
from shardit.models import tiny
from tests.support.guided import CONFIGS, check, outcomes
from tests.support.ranks import run_ranks


def counting(module: Any) -> None:
    """From the third call on, a module doubles its output."""
    plain: Any = type(module)

    class Counting(plain):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = plain.forward(self, *args, **kwargs)
            self.calls += 1
            return out if self.calls < 3 else tuple(2 * x for x in out) if isinstance(out, tuple) else 2 * out

    module.__class__ = Counting


def model(transformer: Any) -> None:
    counting(transformer)


def block(transformer: Any) -> None:
    counting(transformer.transformer_blocks[0])


def processor(transformer: Any) -> None:
    class Counting(QwenDoubleStreamAttnProcessor2_0):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            one, other = super().__call__(*args, **kwargs)
            return (one, other) if self.calls < 3 else (2 * one, 2 * other)

    transformer.transformer_blocks[1].attn.processor = Counting()


def step_cache(transformer: Any) -> None:
    """Every other call skips the blocks and adds their earlier output, as TeaCache does."""
    plain: Any = type(transformer)

    class Caching(plain):
        calls, last = 0, None

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls % 2 == 0:
                return (self.last,)
            self.last = plain.forward(self, hidden_states, *args, **kwargs)[0]
            return (self.last,)

    transformer.__class__ = Caching


def counting_hook(transformer: Any) -> None:
    """A counter that only the hook knows."""
    calls = 0

    def hook(module: Any, args: Any, out: Any) -> Any:
        nonlocal calls
        calls += 1
        return out[0], out[1] * (1 + 0.01 * calls)

    transformer.transformer_blocks[0].register_forward_hook(hook)


def wrapped_blocks(transformer: Any) -> None:
    """Every other call of a block is skipped, as DeepCache does: an object that a function knows keeps the result."""

    class Helper:
        calls, last = 0, None

    helper, block = Helper(), transformer.transformer_blocks[1]
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        helper.calls += 1
        if helper.calls % 2 == 0:
            return helper.last
        helper.last = plain(*args, **kwargs)
        return helper.last

    block.forward = forward


def changing(module: Any, make: Callable[[], Any], step: Callable[[Any, torch.Tensor], Any]) -> None:
    """A module multiplies what it gives by what `step` finds in a state and changes there."""
    plain: Any = type(module)
    module.state = make()

    class Changing(plain):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = plain.forward(self, *args, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
            factor = step(self.state, x)
            return tuple(factor * x for x in out) if isinstance(out, tuple) else factor * out

    module.__class__ = Changing


def deep_store(transformer: Any) -> None:
    """A list in a dict in a list is filled, and looked at later."""

    def step(state: Any, x: torch.Tensor) -> Any:
        seen = state[0]["seen"]
        seen.append(x.mean())
        return 1 + 0.1 * sum(seen[:-1])

    changing(transformer, lambda: [{"seen": []}], step)


@dataclass
class Inner:
    calls: int = 0


class Slots:
    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = Inner()


def deep_object(transformer: Any) -> None:
    def step(state: Any, x: torch.Tensor) -> Any:
        state.slots.inner.calls += 1
        return 1 + 0.1 * state.slots.inner.calls

    changing(transformer.transformer_blocks[1], lambda: SimpleNamespace(slots=Slots()), step)


def counter_in_place(transformer: Any) -> None:
    def step(state: Any, x: torch.Tensor) -> Any:
        return 1 + 0.1 * state.add_(1)

    changing(transformer.transformer_blocks[0].attn, lambda: torch.zeros(()), step)


def cache_in_place(transformer: Any) -> None:
    """The same is written again where a call is repeated."""

    def step(state: Any, x: torch.Tensor) -> Any:
        before = state.clone()
        state.copy_(x.mean())
        return 1 + 0.1 * before

    changing(transformer, lambda: torch.zeros(()), step)


def array(transformer: Any) -> None:
    def step(state: Any, x: torch.Tensor) -> Any:
        state += 1
        return 1 + 0.1 * float(state[0])

    changing(transformer.transformer_blocks[0].attn, lambda: numpy.zeros(1), step)


def class_attribute(transformer: Any) -> None:
    plain: Any = type(transformer.transformer_blocks[0].attn)

    class Counting(plain):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return [(1 + 0.01 * Counting.calls) * x for x in plain.forward(self, *args, **kwargs)]

    for block in transformer.transformer_blocks:
        block.attn.__class__ = Counting


SEEN: list[float] = []


def module_variable(transformer: Any) -> None:
    SEEN.clear()
    plain: Any = type(transformer)

    class Counting(plain):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            SEEN.append(1.0)
            out = plain.forward(self, *args, **kwargs)
            return tuple((1 + 0.1 * len(SEEN)) * x for x in out)

    transformer.__class__ = Counting


def generators(transformer: Any) -> None:
    """Noise of generators that a module owns."""

    def step(state: Any, x: torch.Tensor) -> Any:
        one, other, third = state
        return 1 + 0.1 * torch.rand((), generator=one) + 0.1 * other.random() + 0.1 * third.random()

    make = lambda: (torch.Generator().manual_seed(1), random.Random(1), numpy.random.default_rng(1))  # noqa: E731
    changing(transformer.transformer_blocks[0].attn, make, step)


def generator_of_a_hook(transformer: Any) -> None:
    own = torch.Generator().manual_seed(2)
    noisy = lambda _, __, out: (out[0], out[1] * (1 + 0.1 * torch.rand((), generator=own)))  # noqa: E731
    transformer.transformer_blocks[1].register_forward_hook(noisy)


def class_of_self(transformer: Any) -> None:
    plain: Any = type(transformer.transformer_blocks[0])

    class Counting(plain):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cls = type(self)
            cls.calls += 1
            return tuple((1 + 0.01 * cls.calls) * x for x in plain.forward(self, *args, **kwargs))

    for block in transformer.transformer_blocks:
        block.__class__ = Counting


def setting(transformer: Any, early: bool, read: bool) -> None:
    """A forward that puts another tensor of the same numbers into a module in each call: before the blocks or after
    them, and reads it there, or does not before it sets it."""
    plain: Any = type(transformer)
    transformer.register_buffer("table", torch.ones(3), persistent=False)

    class Setting(plain):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            factor = self.table.mean() if read else 1.0
            if early:
                self.table = torch.arange(3.0) / 8 + 1
            hidden_states = hidden_states * (self.table.mean() if early else 1.0) * factor
            out = plain.forward(self, hidden_states, *args, **kwargs)
            if not early:
                self.table = torch.arange(3.0) / 8 + 1
            return out

    transformer.__class__ = Setting


def table(transformer: Any) -> None:
    setting(transformer, early=True, read=False)


def table_read_early(transformer: Any) -> None:
    setting(transformer, early=True, read=True)


def table_set_late(transformer: Any) -> None:
    setting(transformer, early=False, read=False)


def table_of_a_block(transformer: Any) -> None:
    plain: Any = type(transformer.transformer_blocks[0])
    transformer.transformer_blocks[0].table = torch.ones(3)

    class Setting(plain):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.table = torch.arange(3.0)
            return plain.forward(self, *args, **kwargs)

    transformer.transformer_blocks[0].__class__ = Setting


KEPT = (table_read_early, table_set_late, table_of_a_block)


@pytest.mark.parametrize("axis", ["stages", "guidance"])
def test_tables_that_each_call_sets_before_it_reads_them(axis: str) -> None:
    tiny.resolve("tiny/qwen-image")
    for first, *others in run_ranks(2, outcomes, axis, (table, *KEPT)):
        check(first, table, 0)
        for change, got in zip(KEPT, others, strict=True):
            assert isinstance(got, str), change.__name__
            assert "table in each of its calls" in got


COUNTED = (model, block, processor, step_cache, counting_hook, wrapped_blocks)
DEEP = (deep_store, deep_object, counter_in_place, cache_in_place, array, class_attribute, module_variable)
ALL: tuple[Callable[[Any], None], ...] = (*COUNTED, *DEEP, class_of_self, generators, generator_of_a_hook)


@pytest.mark.parametrize("axis", CONFIGS)
def test_counters_and_caches(axis: str) -> None:
    tiny.resolve("tiny/qwen-image")
    for of_rank in run_ranks(2, outcomes, axis, ALL):
        for change, got in zip(ALL, of_rank, strict=True):
            if axis in ("stages", "guidance") or (axis == "ulysses" and change is class_of_self):
                assert isinstance(got, str), change.__name__
                assert re.search("in each of its calls|Counting.calls through type", got), got
            else:
                check(got, change, 1e-5)


def counted(transformer: Any) -> None:
    """Counts, and changes nothing."""
    calls: list[int] = []
    transformer.register_forward_hook(lambda *_: calls.append(1))


def test_hooks_may_count() -> None:
    for of_rank in run_ranks(2, outcomes, "guidance", [counted]):
        check(of_rank[0], counted, 0)


COLLECTED: list[torch.Tensor] = []


def collecting(transformer: Any) -> None:
    table(transformer)  # the third call, with NaN in it, leaves nothing either
    transformer.transformer_blocks[3].register_forward_hook(lambda _, __, out: COLLECTED.append(out[1]))


def collected(rank: int, count: int, method: str) -> tuple[torch.Tensor | str, int, list[str]]:
    """The latents over two stages, how much a hook has collected on this rank, and warnings."""
    handler = BufferingHandler(1000)
    logging.getLogger("shardit").addHandler(handler)
    (found,) = outcomes(rank, count, method, "stages", [collecting])
    return found, len(COLLECTED), [record.getMessage() for record in handler.buffer]


def test_what_hooks_collect_is_that_of_one_rank() -> None:
    tiny.resolve("tiny/qwen-image")
    first, second = run_ranks(2, collected)
    check(first[0], collecting, 0)
    check(second[0], collecting, 0)
    assert (first[1], second[1]) == (0, 10)  # the calls that check leave nothing
    text = "its calls change transformer_blocks.3.hook.COLLECTED, but each rank makes a part of them"
    assert [text in message for message in first[2] if "its calls" in message] == [True]


def test_what_changes_after_first_calls_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    first = FirstCalls(CutModel(model, [], []), SimpleNamespace())  # pyright: ignore[reportArgumentType]
    first.left = state_of(model)
    model[0].processor = object()
    first.end()
    assert not caplog.messages
    first.left = state_of(model)
    model[0].last = torch.zeros(2)
    first.end()
    first.end()
    assert [text.partition(":")[2] for text in caplog.messages] == [
        " calls after the first ones change 0.last, and each rank makes a part of them: compare with one rank"
    ]


def test_what_is_changed_deep_is_put_back() -> None:
    module: Any = nn.Linear(2, 2)
    module.register_buffer("count", torch.zeros(()))
    own, seen, array, bits = torch.Generator().manual_seed(1), [torch.zeros(2)], numpy.zeros(2), bytearray(b"1")
    module.state = SimpleNamespace(slots=Slots(), store={"seen": seen}, array=array, own=own, bits=bits)
    count, before = module.count, state_of(module)
    module.state.slots.inner.calls, module.count = 3, module.count + 1
    seen[0].add_(1)
    seen.append(torch.ones(2))
    array += 1
    torch.rand(2, generator=own)
    bits[0] = 2
    Slots.kept = 1  # pyright: ignore[reportAttributeAccessIssue]
    names = {"slots.inner.calls", "store.seen", "array", "own", "bits"}
    found = differences(before, state_of(module))
    assert {*found} == {"count", "Slots.kept", *(f"state.{name}" for name in names)}
    restore(before)
    assert differences(before, state_of(module)) == []
    assert (module.state.slots.inner.calls, seen[0].sum(), len(seen), array.sum(), bits) == (0, 0, 1, 0, b"1")
    assert module.count is count
    assert own.get_state().equal(torch.Generator().manual_seed(1).get_state())
    assert not hasattr(Slots, "kept")


def test_state_in_functions() -> None:
    module, calls, seen = nn.Sequential(nn.Linear(2, 2)), 0, []

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        seen.append(calls)

    module[0].register_forward_pre_hook(hook)
    before = state_of(module)
    module(torch.randn(3, 2))
    assert differences(before, state_of(module)) == []
    assert differences(before, state_of(module), outside=True) == ["0.hook.calls", "0.hook.seen"]
    restore(before)
    assert (calls, seen) == (0, [])


def test_state_is_compared_and_put_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    counted: Any = module[0]
    counted.calls, counted.seen, counted.gone = 1, [1], "x"
    counted.size, counted.scale = torch.Size([1, 2]), {"a": 0.3}
    before = state_of(module)
    counted.size, counted.scale["a"] = torch.Size([1, 2]), 0.3 * 0.7 / 0.7
    assert differences(before, state_of(module)) == []
    counted.calls, counted.new = 2, 0.5
    counted.seen.append(2)
    del counted.gone
    module(torch.randn(3, 2))
    after = state_of(module)
    changed = ["0.calls", "0.gone", "0.new", "0.seen", "1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert sorted(differences(before, after)) == changed
    restore(before)
    assert differences(before, state_of(module)) == []
    assert (counted.calls, counted.seen, counted.gone, hasattr(counted, "new")) == (1, [1], "x", False)
