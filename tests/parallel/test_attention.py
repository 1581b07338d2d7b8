"""Attention over sharded tokens against plain attention: Ulysses, Ring and both, masks, uneven shards and heads."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from shardit.parallel.attention.sequence_attention import AttentionLayout, Call, SequenceAttention
from shardit.parallel.attention.softmax_merge import _math, merge, partial_attention
from tests.support.ranks import run_ranks

WIDTH = 8


@dataclass(frozen=True)
class Case:
    """One attention call. mask: which one of `make_mask`; "whole" is one whose rows are not cut, "valid" one of valid
    tokens with the rows and the columns of one rank. causal: a query attends to the keys up to its own position."""

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int = 4
    k_heads: int = 4
    batch: int = 1
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    causal: bool = False


def plain(q: Any, k: Any, v: Any, mask: Any, causal: bool = False) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def make_mask(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """The whole mask: over keys, over queries and keys, for each head, or one that hides all from some queries."""
    rows, columns = sum(case.q_lens), sum(case.k_lens)
    if case.mask == "none":
        return None
    if case.mask == "keys":
        return torch.rand(case.batch, 1, 1, columns, generator=generator) > 0.4
    if case.mask == "heads":
        return torch.randn(1, case.heads, rows, columns, generator=generator)
    if case.mask == "valid":
        valid = torch.rand(case.batch, 1, columns, generator=generator) > 0.3
        return valid[..., None, :] & valid[..., None]
    mask = torch.rand(case.batch, 1, rows, columns, generator=generator) > 0.5
    mask[:, :, ::3, : columns // 2] = False  # nothing to be seen in whole blocks of keys
    if case.mask == "blind":
        mask[:, :, 1] = False
    return mask


def one_case(attention: SequenceAttention, rank: int, case: Case) -> float:
    """Return the relative difference of this rank's rows, after a check of the sent bytes."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, sum(case.q_lens), case.heads, WIDTH)
    q = torch.randn(shape, generator=generator)
    k, v = (torch.randn(case.batch, sum(case.k_lens), case.k_heads, WIDTH, generator=generator) for _ in range(2))
    mask = make_mask(case, generator)
    q, k, v = (t.to(case.dtype) for t in (q, k, v))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(case.dtype)
    expected = plain(q, k, v, mask, case.causal).split(case.q_lens, 1)[rank]
    local = q.split(case.q_lens, 1)[rank], *(t.split(case.k_lens, 1)[rank] for t in (k, v))
    layout = AttentionLayout(case.q_lens, case.k_lens)
    if mask is not None and case.mask == "keys":
        mask, layout = mask.split(case.k_lens, 3)[rank], AttentionLayout(case.q_lens, case.k_lens, mask_columns=True)
    elif mask is not None and case.mask == "valid":
        mask = mask.split(case.q_lens, 2)[rank].split(case.k_lens, 3)[rank]
        layout = AttentionLayout(case.q_lens, case.k_lens, valid_tokens=True)
    elif mask is not None and case.mask != "whole":
        mask, layout = mask.split(case.q_lens, 2)[rank], AttentionLayout(case.q_lens, case.k_lens, mask_rows=True)
    inner = functools.partial(plain, causal=case.causal)
    out = attention.attend(Call(*local, mask, inner, causal=case.causal), layout)
    assert out.shape == expected.shape
    assert out.dtype == case.dtype
    assert torch.isfinite(out).all()
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


def all_cases(rank: int, count: int, method: str, degrees: dict, cases: list[Case]) -> list[float]:
    mesh = init_mesh(DiffusionParallelConfig(**degrees), device="cpu", timeout_s=60, rank=rank, init_method=method)
    attention = SequenceAttention(mesh)
    return [one_case(attention, rank, case) for case in cases]


def cases_for(count: int) -> list[Case]:
    uneven = tuple((5, 3, 8, 2)[:count])
    other = tuple((2, 7, 1, 4)[:count])
    even = (6,) * count
    heads = [(4, 4), (3, 3), (5, 5), (8, 2), (6, 3), (4, 1)]
    cases = [Case(lens, lens, h, k) for lens in (uneven, even) for h, k in heads]
    cases += [Case(uneven, other), Case(other, uneven, 5, 5), Case(uneven, other, 6, 3, batch=2)]
    masks = ("keys", "rows", "heads", "blind")
    cases += [
        Case(uneven, lens, 5, 5, mask=mask, batch=b)
        for mask, lens, b in itertools.product(masks, (uneven, other), (1, 2))
    ]
    cases += [Case(lens, lens, h, k, causal=True) for lens in (uneven, even) for h, k in ((4, 4), (6, 3))]
    cases += [Case((0, *uneven[1:]), (0, *uneven[1:]), causal=True)]
    cases += [Case(uneven, lens, mask="whole", batch=2) for lens in (uneven, other)]
    cases += [Case(lens, lens, mask="valid", batch=b) for lens in (uneven, even) for b in (1, 2)]
    cases += [Case((0, *uneven[1:]), (0, *uneven[1:])), Case(even, (*even[1:], 0), mask="keys")]
    cases += [Case(uneven, uneven, 1, 1), Case(uneven, uneven, mask="keys", dtype=torch.bfloat16)]
    return cases


@pytest.mark.parametrize(
    "degrees",
    [{"ulysses_degree": 2}, {"ring_degree": 2}, {"ulysses_degree": 3}, {"ring_degree": 3}],
    ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()),
)
def test_against_plain(degrees: dict) -> None:
    (count,) = degrees.values()
    check(count, degrees)


def test_ring_of_ulysses() -> None:
    check(4, {"ulysses_degree": 2, "ring_degree": 2})


def check(count: int, degrees: dict) -> None:
    cases = cases_for(count)
    for errors in run_ranks(count, all_cases, degrees, cases, timeout=100):
        for case, error in zip(cases, errors, strict=True):
            assert error <= (1e-2 if case.dtype is torch.bfloat16 else 2e-6), (case, error)


def ulysses_bytes(
    rank: int, lens: Sequence[int], q_heads: Sequence[int], k_heads: Sequence[int], width: int, itemsize: int
) -> int:
    """Return the bytes that `rank` sends for one self-attention of one sample: q, k and v of its tokens for the heads
    of all others, and its heads of the output for the tokens of all others."""
    others = [r for r in range(len(lens)) if r != rank]
    there = lens[rank] * sum(q_heads[r] + 2 * k_heads[r] for r in others)
    back = q_heads[rank] * sum(lens[r] for r in others)
    return (there + back) * width * itemsize


def counted(rank: int, count: int, method: str, lens: tuple[int, ...], heads: int, k_heads: int) -> tuple[int, int]:
    config = DiffusionParallelConfig(ulysses_degree=count)
    attention = SequenceAttention(init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method))
    q = torch.randn(1, lens[rank], heads, WIDTH)
    k = torch.randn(1, lens[rank], k_heads, WIDTH)
    attention.attend(Call(q, k, k, None, plain), AttentionLayout(lens, lens))
    assert attention.ulysses is not None
    q_share, k_share = attention.ulysses.shares(heads, k_heads)
    assert attention.ulysses.comm.messages == 2 * (count - 1)  # one to every other rank, one back
    return attention.sent_bytes, ulysses_bytes(rank, lens, q_share, k_share, WIDTH, 4)


def test_bytes_of_one_ulysses_attention() -> None:
    for sent, formula in run_ranks(3, counted, (5, 3, 4), 6, 3):
        assert sent == formula
    # Even shards of S tokens and H heads on P ranks: 4 * S * H * D * (P - 1) / P**2 numbers for q, k, v and the result.
    for sent, formula in run_ranks(2, counted, (6, 6), 4, 4):
        assert sent == formula == 4 * 12 * 4 * WIDTH * 4 * (2 - 1) // 2**2


def around(rank: int, count: int, method: str, lens: tuple[int, ...]) -> tuple[int, int]:
    config = DiffusionParallelConfig(ring_degree=count)
    attention = SequenceAttention(init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method))
    q, k = torch.randn(1, lens[rank], 4, WIDTH), torch.randn(1, lens[rank], 2, WIDTH)
    attention.attend(Call(q, k, k, None, plain), AttentionLayout(lens, lens))
    assert attention.ring is not None
    return attention.sent_bytes, attention.ring.messages


@pytest.mark.parametrize("lens", [(6, 6), (4, 4, 4), (5, 3, 4)], ids=str)
def test_bytes_of_one_ring_attention(lens: tuple[int, ...]) -> None:
    """Keys and values of each rank's tokens travel to the next rank, P - 1 times; nothing else does."""
    count = len(lens)
    for rank, (sent, messages) in enumerate(run_ranks(count, around, lens)):
        held = [lens[(rank - step) % count] for step in range(count - 1)]
        assert sent == 2 * sum(held) * 2 * WIDTH * 4
        assert messages == count - 1


def refused(rank: int, count: int, method: str) -> None:
    mesh = init_mesh(DiffusionParallelConfig(ring_degree=2), device="cpu", timeout_s=60, rank=rank, init_method=method)
    q = torch.randn(1, 3, 2, WIDTH)
    call = Call(q, q, q, None, plain, not_ring="dropout")
    with pytest.raises(UnsupportedError, match="ring_degree=2 does not work with dropout"):
        SequenceAttention(mesh).attend(call, AttentionLayout((3, 3), (3, 3)))


def test_ring_refuses_attention_that_it_cannot_merge() -> None:
    run_ranks(2, refused)


def test_partial_attention_and_merge() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16) for n in (5, 9, 9))
    mask = torch.rand(2, 1, 5, 9) > 0.4
    mask[:, :, 0] = False
    mask[:, :, 1, :4] = False
    parts = [partial_attention(q, k[:, s], v[:, s], mask[..., s], None) for s in (slice(0, 4), slice(4, 9))]
    out, lse = merge(*parts)
    assert torch.isfinite(out).all()
    assert (out[:, 0] == 0).all()
    torch.testing.assert_close(out, plain(q, k, v, mask), atol=1e-6, rtol=1e-5)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT / 4).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    by_hand = _math(*(t.transpose(1, 2) for t in (q, k, v)), None, 0.25, False)[0].transpose(1, 2)
    torch.testing.assert_close(by_hand, plain(q, k, v, None), atol=1e-6, rtol=1e-5)
    by_hand = _math(*(t.transpose(1, 2) for t in (q, k, v)), None, 0.25, True)[0].transpose(1, 2)
    torch.testing.assert_close(by_hand, plain(q, k, v, None, causal=True), atol=1e-6, rtol=1e-5)
