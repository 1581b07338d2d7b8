"""Linear attention over ranks: each computes the state of its own tokens, and the states are added up."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, RankError
from shardit.core.comm.collectives import Collectives
from shardit.core.runtime.pending import materialize
from shardit.parallel.sequence.partitioned.run import Rows
from shardit.parallel.sequence.partitioned.sums import RowSum, contractions, shapes_noted, summed, sums_of
from tests.diffusion.test_parallelize import join
from tests.parallel.sequence.test_partitioned import CLOSE, distance
from tests.support.ranks import run_ranks

HEADS, WIDTH, TEXT = 2, 32, 5


class LinearAttention(nn.Module):
    """Attention whose keys and values become one matrix for each head; `tables` turn queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        tokens = tokens - tokens.mean(1, keepdim=True)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, 2))
        q, k = (F.relu(t * tables[0] + t.flip(-1) * tables[1]) + 0.1 for t in (q, k))
        state, total = torch.einsum("bhnd,bhne->bhde", k, v), k.sum(2, keepdim=True)
        out = (q @ state) / (q * total).sum(-1, keepdim=True)
        return self.out(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to text, which every rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(tokens), self.to_k(text), text))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Grid(nn.Module):
    """A feed-forward whose tokens see their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.depthwise = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=2 * WIDTH)

    def forward(self, channels: torch.Tensor) -> torch.Tensor:
        return self.outer(F.silu(self.depthwise(F.silu(self.inner(channels)))))


class Block(nn.Module):
    """Its tokens cannot be split: they are laid out as a picture of a given height."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cross, self.grid = LinearAttention(), CrossAttention(), Grid()

    def forward(self, tokens: torch.Tensor, text: torch.Tensor, tables: Any, height: int) -> torch.Tensor:
        tokens = tokens + self.attention(tokens, tables)
        tokens = tokens + self.cross(tokens, text)
        picture = tokens.transpose(1, 2).unflatten(2, (height, -1))
        return tokens + self.grid(picture).flatten(2).transpose(1, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, picture: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        height, tokens = picture.shape[2], picture.flatten(2).transpose(1, 2)
        angles = torch.linspace(0, 3, tokens.shape[1])[:, None] * torch.linspace(1, 0.1, WIDTH // HEADS)
        for block in self.blocks:
            tokens = block(tokens, text, (angles.cos().to(tokens), angles.sin().to(tokens)), height)
        return tokens


def inputs(height: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height)
    return (
        torch.randn(1, WIDTH, height, width, generator=generator),
        torch.randn(1, TEXT, WIDTH, generator=generator),
    )


def linear(rank: int, count: int, method: str, way: dict[str, int]) -> tuple[dict[str, Rows], int]:
    """The rows that were found, and the bytes that this rank sends in a call of 8 x 6 tokens."""
    join(rank, count, method)
    plain, other = Model(), shardit.parallelize(Model(), DiffusionParallelConfig(**way), timeout_s=30)

    def differs(height: int) -> float:
        with torch.no_grad():
            expected, got = plain(*inputs(height)), other(*inputs(height))
            materialize(got)
        return distance(expected, got)

    assert max(differs(height) for height in (8, 8, 10, 10)) <= CLOSE
    before = other.shardit_sequence.attention.sent_bytes
    assert differs(8) <= CLOSE
    sent = other.shardit_sequence.attention.sent_bytes - before
    reduce = Collectives.all_reduce
    Collectives.all_reduce = lambda self, tensor, **_: tensor  # type: ignore[method-assign]
    assert differs(8) > 100 * CLOSE  # or the comparisons would show nothing
    Collectives.all_reduce = reduce  # type: ignore[method-assign]
    (found, _) = other.shardit_sequence.partitioned  # one for each height
    return dict(found.rows), sent


@pytest.mark.parametrize(("count", "way"), [(2, "ulysses"), (2, "ring"), (3, "ring")])
def test_states_are_added_up(count: int, way: str) -> None:
    for rank, (rows, sent) in enumerate(run_ranks(count, linear, {f"{way}_degree": count})):
        assert sorted(rows) == ["attention", "cross", "grid"]
        assert rows["attention"].dims == ((3, 1), (2, 0), (2, 0))  # the tables have the rows of their tokens
        assert sorted(one.mean for one in rows["attention"].sums.values()) == [False, False, True]
        assert rows["cross"].dims == ((3, 1), (3, None))
        assert (rows["grid"].dims, rows["grid"].halo) == (((4, 2),), 1)
        assert not rows["cross"].sums
        assert not rows["grid"].sums
        # Of each block: the results of three modules for its own tokens, and three sums.
        tokens = 48 // count
        height = [3, 3, 2][rank] if count == 3 else 4
        gathered = 4 * WIDTH * (2 * tokens + 6 * height) * (count - 1)
        sums = (WIDTH, HEADS * (WIDTH // HEADS) ** 2, WIDTH)
        assert sent == 2 * (gathered + sum(2 * 4 * n * (count - 1) // count for n in sums))


def staged(rank: int, count: int, method: str) -> tuple[float, float]:
    """Over stages, too; and how far bfloat16 is from float32 over two ranks and on one."""
    join(rank, count, method)
    config = DiffusionParallelConfig(ring_degree=2, pipeline_parallel_size=2)
    plain, other, half = Model(), shardit.parallelize(Model(), config, timeout_s=30), Model().bfloat16()
    over = shardit.parallelize(Model().bfloat16(), config, timeout_s=30)
    given = inputs(8)
    with torch.no_grad():
        expected, got = plain(*given), [other(*given) for _ in range(2)]
        materialize(got)
        assert max(distance(expected, one) for one in got) <= CLOSE
        rough = tuple(t.bfloat16() for t in given)
        alone, spread = half(*rough), over(*rough)
        materialize(spread)
    return distance(expected, alone), distance(expected, spread)


def test_over_stages_and_in_half_precision() -> None:
    for alone, spread in run_ranks(4, staged):
        assert 1e-4 < spread <= 1.3 * alone


def test_another_operation_ends_the_ranks() -> None:
    """The others wait for a sum that does not come, or is of another size."""
    comm: Any = SimpleNamespace(group=SimpleNamespace(rank=1), all_reduce=lambda tensor, meanwhile: tensor * 2)
    rows = torch.randn(5, 4)
    sums = {("aten::sum.dim_IntList", 0): RowSum(mean=True, shape=(4,))}
    with summed(sums, comm, share=0.25):
        found = rows.sum(0)
    torch.testing.assert_close(found, rows.sum(0) / 2)
    with pytest.raises(RankError, match=r"call 1 of aten::sum.dim_IntList in a module did not run, but made \[4\]"):
        with summed(sums, comm, share=0.25):
            rows.amax(0)
    with pytest.raises(RankError, match=r"made \[5\], but made \[4\] in an earlier call"):
        with summed(sums, comm, share=0.25):
            rows.sum(1)


def noted(function: Any, rows: torch.Tensor) -> Any:
    with shapes_noted() as shapes:
        out = function(rows)
    return shapes, out


def test_what_is_a_sum() -> None:
    """A product that contracts the rows, a sum, a mean; not the first row, the largest one, or what squares a sum."""
    torch.manual_seed(0)
    rows, other = torch.randn(9, 4), torch.randn(4, 4)
    parts = rows.split([5, 4])
    for function, mean in (
        (lambda x: x.T @ x, False),
        (lambda x: x.sum(0), False),
        (lambda x: torch.einsum("ni,nj->ij", x, x.relu()), False),
        (lambda x: x.mean(0), True),
        (lambda x: x[0] * 2, None),
        (lambda x: x.amax(0), None),
    ):
        whole, out = noted(function, rows)
        of_part, _ = noted(function, parts[0])
        sites = contractions(whole, of_part)
        assert len(sites) == 1, sites
        values, found = {sites[0]: out}, [{sites[0]: function(part)} for part in parts]
        sums = sums_of(values, found, [5, 4])
        assert (None if sums is None else [one.mean for one in sums.values()]) == (None if mean is None else [mean])
    whole, _ = noted(functools.partial(torch.matmul, other=other), rows)
    assert not contractions(whole, noted(functools.partial(torch.matmul, other=other), parts[0])[0])
