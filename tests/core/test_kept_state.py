"""State that a transformer keeps from call to call: as on one rank, or refused on all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn

from shardit.core.modules.module_state import differences, restore, state_of
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


ALL: tuple[Callable[[Any], None], ...] = (model, block, processor, step_cache, counting_hook, wrapped_blocks)


@pytest.mark.parametrize("axis", CONFIGS)
def test_counters_and_caches(axis: str) -> None:
    tiny.resolve("tiny/qwen-image")
    for of_rank in run_ranks(2, outcomes, axis, ALL):
        for change, got in zip(ALL, of_rank, strict=True):
            if axis in ("stages", "guidance"):
                assert isinstance(got, str), change.__name__
                assert re.search("in each of its calls|keeps tensors of its calls", got), got
            else:
                check(got, change, 1e-5)


def counted(transformer: Any) -> None:
    """Counts, and changes nothing."""
    calls: list[int] = []
    transformer.register_forward_hook(lambda *_: calls.append(1))


def test_hooks_may_count() -> None:
    for of_rank in run_ranks(2, outcomes, "guidance", [counted]):
        check(of_rank[0], counted, 0)


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
