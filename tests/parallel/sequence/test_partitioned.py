"""Blocks whose tokens cannot be split: their operations are partitioned over the ranks, or the model is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.core.comm.collectives import Collectives
from shardit.core.runtime.pending import materialize
from shardit.parallel.attention.sequence_attention import Call
from shardit.parallel.sequence.partitioned.run import CHANNELS, Rows, attention_share, memory_order
from tests.diffusion.test_parallelize import join
from tests.support.ranks import run_ranks
from tests.support.transformers_page import TOKENS, run_sharded

CLOSE = 1e-5
WIDTH = 16
WAYS = [{"ulysses_degree": 2}, {"ring_degree": 2}]


def distance(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((expected.double() - got.double()).norm() / expected.double().norm())


class Block(nn.Module):
    """A block that no rank can run on a part of its tokens: each token takes the sum of those before it.

    grid: a convolution over the tokens, laid out with the channels before them, and a view of its result.
    """

    def __init__(self, grid: bool = False, heads: int = 4):
        super().__init__()
        self.grid, self.heads = grid, heads
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Conv1d(WIDTH, WIDTH, 1)
        self.wide = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + 0.1 * hidden_states.cumsum(1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(hidden_states).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden_states = hidden_states + self.out(attended.transpose(1, 2).flatten(2))
        if self.grid:
            channels = self.wide(self.inner(hidden_states.transpose(1, 2).contiguous()))
            hidden_states = hidden_states + self.depthwise(channels).view(1, WIDTH, -1).transpose(1, 2)
        return hidden_states + self.mlp(hidden_states)


class Refiner(nn.Module):
    """A block of which nothing can be partitioned."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(WIDTH, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.linear(hidden_states.mean(1, keepdim=True))[..., :WIDTH]


class Plain(nn.Module):
    """A block whose tokens can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16 * WIDTH), nn.GELU(), nn.Linear(16 * WIDTH, WIDTH))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(hidden_states)


class Model(nn.Module):
    """Lists of blocks, one after the other."""

    def __init__(self, **lists: Sequence[nn.Module]):
        super().__init__()
        self.names = list(lists)
        for name, blocks in lists.items():
            setattr(self, name, nn.ModuleList(blocks))
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            for block in getattr(self, name):
                hidden_states = block(hidden_states)
        return hidden_states


def over(model: nn.Module, way: dict[str, Any]) -> Any:
    return shardit.parallelize(model, DiffusionParallelConfig(**way), timeout_s=30)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(count))


def agrees(plain: nn.Module, other: nn.Module, count: int) -> bool:
    with torch.no_grad():
        expected, got = plain(tokens(count)), other(tokens(count))
        materialize(got)
    return distance(expected, got) <= CLOSE


def partitioned(rank: int, count: int, method: str, way: dict[str, int]) -> set[tuple[str, int]]:
    """The rows that linears and convolutions have seen in a call of 9 tokens."""
    join(rank, count, method)
    make = functools.partial(Model, blocks=[Block(), Block(grid=True), Plain()])
    plain, other = Model(blocks=[Block(), Block(grid=True), Plain()]), over(make(), way)
    seen = set[tuple[str, int]]()
    for length in (9, 1, 12):  # one token: fewer than ranks
        assert agrees(plain, other, length)
        assert agrees(plain, other, length)
    assert len(other.shardit_sequence.partitioned) == 2
    assert len(other.shardit_sequence._plans) == 1
    rows: dict[str, Rows] = next(d.rows for d in other.shardit_sequence.partitioned if "wide" in d.rows)
    dims = {name: own.dims for name, own in rows.items()}
    assert (dims["inner"], dims["wide"], dims["mlp"]) == (((3, 2),), ((3, CHANNELS),), ((3, 1),))
    assert "depthwise" not in rows
    for name, part in other.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv1d)):
            dim = -1 if isinstance(part, nn.Conv1d) else 1

            def note(_: Any, args: Any, name: str = name, dim: int = dim) -> None:
                seen.add((name, args[0].shape[dim]))

            part.register_forward_pre_hook(note)
    assert agrees(plain, other, 9)
    seen.clear()
    assert agrees(plain, other, 9)
    gather = Collectives.all_gather
    Collectives.all_gather = lambda self, *args: gather(self, *args).zero_()  # type: ignore[method-assign]
    assert not agrees(plain, other, 9)  # or the comparisons would show nothing
    Collectives.all_gather = gather  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("way", WAYS, ids=["ulysses", "ring"])
def test_operations_are_partitioned(way: dict[str, int]) -> None:
    found = run_ranks(2, partitioned, way)
    for seen, own in zip(found, (5, 4), strict=True):
        rows = {name: {n for other, n in seen if other == name} for name, _ in seen}
        assert rows.pop("blocks.1.depthwise") == {9}  # each output has its neighbours, so every rank computes all
        assert rows.pop("blocks.1.wide") == {9}  # some channels of each; all of them now that it has a hook
        assert rows["blocks.0.mlp.0"] == rows["blocks.1.qkv"] == {own}
        assert all(seen == {own} for seen in rows.values()), rows


def staged(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    blocks = [Block(), Plain(), Block(grid=True), Plain()]
    plain, other = Model(blocks=blocks), Model(blocks=[Block(), Plain(), Block(grid=True), Plain()])
    other = over(other, {"ulysses_degree": 2, "pipeline_parallel_size": 2})
    assert all(agrees(plain, other, length) for length in (9, 9, 12))


def test_over_stages() -> None:
    run_ranks(4, staged)


class Summed(nn.Module):
    """A block with few parameters, of which nothing can be partitioned, and which sees all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + hidden_states.cumsum(1) @ self.weight / 100


class Shortened(Model):
    """A model whose large blocks see the first tokens only."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.refiner:
            hidden_states = block(hidden_states)
        for block in self.blocks:
            hidden_states = torch.cat([block(hidden_states[:, :2]), hidden_states[:, 2:]], 1)
        return hidden_states


def lists(rank: int, count: int, method: str, way: dict[str, int]) -> None:
    """A list that takes few of the multiplications runs whole, though it may have many parameters, and the large one
    over the ranks; a list that takes many is refused, though it may have few parameters."""
    join(rank, count, method)
    for width in (4, 400):
        blocks = [Plain() for _ in range(4)]
        plain = Model(refiner=[Refiner(width * WIDTH)], blocks=blocks)
        other = over(Model(refiner=[Refiner(width * WIDTH)], blocks=[Plain() for _ in range(4)]), way)
        assert agrees(plain, other, 90)
        assert agrees(plain, other, 90)
        (whole,) = other.shardit_sequence.partitioned
        assert whole.share == 0
        assert not whole.rows
        assert len(other.shardit_sequence._plans) == 1
    shortened = over(Shortened(refiner=[Summed()], blocks=[Plain()]), way)
    for large, name in ((shortened, "Summed"), (over(Model(blocks=[Refiner()]), way), "Refiner")):
        for _ in range(2):  # and again in the next call
            with pytest.raises(UnsupportedError, match=rf"no way was found to shard the tokens of {name}"):
                large(tokens(90))
    assert agrees(Shortened(refiner=[Summed()], blocks=[Plain()]), shortened, 3)


@pytest.mark.parametrize("way", WAYS, ids=["ulysses", "ring"])
def test_a_small_list_runs_whole(way: dict[str, int]) -> None:
    run_ranks(2, lists, way)


class Flagged(nn.Module):
    """A module whose tokens see one another only where a number among its arguments is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, hidden_states: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        summed = hidden_states.cumsum(1)
        return self.linear(torch.where(flags.bool()[..., None], hidden_states, summed))[..., :WIDTH]


class FlaggedModel(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block() for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, flags)
        return hidden_states


class FlaggedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Flagged()

    def forward(self, hidden_states: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        return hidden_states.cumsum(1) / 10 + self.part(hidden_states, flags)


class FlaggedTokens(Flagged):
    """A block that computes token by token unless all flags are zero."""

    def forward(self, hidden_states: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        summed = hidden_states.cumsum(1)
        return self.linear(torch.where(flags.any(), hidden_states, summed))[..., :WIDTH]


def flagged(rank: int, count: int, method: str) -> None:
    """The noise of the trial sets all flags, so that it alone would not show what they hide."""
    join(rank, count, method)
    for block, partitioned in ((FlaggedBlock, "part.linear"), (FlaggedTokens, "linear")):
        plain, other = FlaggedModel(block), over(FlaggedModel(block), WAYS[0])
        for flags in (torch.zeros(1, 9), torch.ones(1, 9)):
            with torch.no_grad():
                expected, got = plain(tokens(9), flags), other(tokens(9), flags)
                materialize(got)
            assert distance(expected, got) <= CLOSE
        (found,) = other.shardit_sequence.partitioned
        assert list(found.rows) == [partitioned]


def test_flags_that_noise_sets() -> None:
    run_ranks(2, flagged)


class Masked(nn.Module):
    """Self-attention with a mask that is made of the tokens of a rank: of valid tokens, or of tokens of one part."""

    def __init__(self, parts: bool):
        super().__init__()
        self.parts = parts
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + marks.unsqueeze(-1)  # so each rank needs the marks of its own tokens
        rows, columns = marks[:, None, :, None], marks[:, None, None]
        mask = rows == columns if self.parts else rows & columns
        q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.qkv(hidden_states).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return hidden_states + self.out(attended.transpose(1, 2).flatten(2))


class MaskedModel(nn.Module):
    def __init__(self, parts: bool):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Masked(parts) for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, marks)
        return hidden_states


def masked(rank: int, count: int, method: str, way: dict[str, int]) -> None:
    """The mask of valid tokens is put together again. That of parts cannot be: its first call has one part only, which
    a rank cannot tell from a mask of valid tokens."""
    join(rank, count, method)
    of_parts = [torch.zeros(1, 9), torch.tensor([[0.0] * 5 + [1.0] * 4]), torch.tensor([[0.0] * 3 + [1.0] * 6])]
    of_valid = [torch.ones(1, 9, dtype=torch.bool), torch.arange(9)[None] < 7]
    for parts, marks in ((False, of_valid), (True, [m.int() for m in of_parts])):
        plain, other = MaskedModel(parts), over(MaskedModel(parts), way)
        for mark in (*marks, *marks):
            with torch.no_grad():
                expected, got = plain(tokens(9), mark), other(tokens(9), mark)
            assert distance(expected.nan_to_num(), got.nan_to_num()) <= CLOSE
        assert bool(other.shardit_sequence.partitioned) == parts
        assert bool(other.shardit_sequence._plans) != parts


@pytest.mark.parametrize("way", WAYS, ids=["ulysses", "ring"])
def test_masks_made_of_a_ranks_tokens(way: dict[str, int]) -> None:
    run_ranks(2, masked, way)


def test_shares_of_attention() -> None:
    """Heads where there are enough, else queries; together they are the whole."""
    torch.manual_seed(0)

    def inner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, causal: bool) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    for heads, k_heads, mask, causal, dim in (
        (5, 5, None, False, 2),
        (6, 3, None, True, 2),
        (5, 5, torch.rand(1, 5, 7, 7) > 0.4, False, 2),
        (4, 1, torch.randn(7, 7), False, 1),
        (1, 1, torch.randn(1, 1, 1, 7), False, 1),
        (1, 1, None, True, None),
    ):
        q, k, v = (torch.randn(1, 7, n, 8) for n in (heads, k_heads, k_heads))
        call = Call(q, k, v, mask, functools.partial(inner, causal=causal), causal=causal)
        share = attention_share(call, 3)
        assert (None if share is None else share.dim) == dim
        if share is not None:
            outs = [share.run(call, rank) for rank in range(3)]
            torch.testing.assert_close(torch.cat(outs, share.dim), call.inner(q, k, v, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", list(TOKENS))
def test_models_of_diffusers(way: str) -> None:
    """A few of the survey: small refiners, convolutions and linear attention, prompts of several lengths, causal
    segments."""
    ids = ["HunyuanVideo15Transformer3DModel", "SanaVideoTransformer3DModel", "MochiTransformer3DModel"]
    ids += [
        "UNet2DConditionModel",
        "QwenImage21Transformer2DModel",
        "LTX2VideoTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
    ]
    for found in run_ranks(2, run_sharded, ids, TOKENS[way], timeout=100):
        assert all(isinstance(error, float) and error <= CLOSE for error in found.values()), found


def test_a_mask_that_only_flex_attention_knows() -> None:
    """AnyFlow's masks are of blocks, for all tokens: Ulysses hands them on; Ring has a kernel of its own."""
    name = "AnyFlowFARTransformer3DModel"
    ulysses, ring = (run_ranks(2, run_sharded, [name], TOKENS[way])[0][name] for way in ("ulysses 2", "ring 2"))
    assert isinstance(ulysses, float)
    assert ulysses <= CLOSE
    assert "ring_degree=2 does not work with the attention back end 'flex'" in str(ring)


ORDERS = [
    ((1, 32, 4, 4), (32, 1, 128, 32), 0, [0, 2, 3, 1]),  # attention's output, transposed: one sample
    ((1, 32, 4, 4), (512, 1, 128, 32), 0, [0, 2, 3, 1]),
    ((2, 32, 4, 4), (512, 16, 4, 1), 0, [0, 1, 2, 3]),
    ((2, 32, 1, 4), (128, 4, 4, 1), 2, [0, 1, 2, 3]),
    ((2, 32, 1, 4), (384, 12, 4, 1), 2, [0, 1, 2, 3]),  # a row of three
    ((2, 32, 1, 4), (128, 1, 128, 32), 2, [0, 2, 3, 1]),
    ((2, 32, 4, 1), (128, 1, 32, 32), 3, [0, 2, 3, 1]),
]


@pytest.mark.parametrize(("shape", "strides", "dim", "order"), ORDERS, ids=str)
def test_order_in_memory_of_gathered_rows(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int, order: list[int]
) -> None:
    assert memory_order(torch.empty_strided(shape, strides), dim) == order
