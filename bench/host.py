"""Host time: the CPU time of Python that shardit adds to a forward of 40 blocks which do next to nothing.

Medians over many forwards, of the main thread of each rank. Costs of one block call, placeholder or hop are differences
between runs whose numbers of these differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardit
from bench.ranks import Ranks
from shardit.core.runtime.program import Program
from shardit.core.runtime.request_loop import RequestLoop, Schedule

BLOCKS = 40
CHUNKS = 8
WIDTH, TOKENS, HEADS = 8, 8, 2


class Scale(nn.Module):
    """A block with one small operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, x, by)


class Attend(Scale):
    """A block with one attention call."""

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        heads = super().forward(x, by).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Feed(nn.Module):
    """A block with two linears, which tensor ranks follow with a sum."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward

        self.ff = FeedForward(WIDTH, bias=False)

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return self.ff(x * by)


class Model(nn.Module):
    """A transformer of blocks of one class."""

    def __init__(self, block: Callable[[], nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, by)
        return x


KINDS = {"scale": Scale, "attend": Attend, "feed": Feed}


def forward_us(kind: str, options: dict[str, Any] | None, runs: int) -> float:
    """Return the CPU time of a forward on this rank in microseconds. options: of parallelize; None: plain."""
    torch.manual_seed(0)
    model = Model(KINDS[kind]).eval()
    x, by = torch.randn(1, TOKENS, WIDTH), torch.ones(WIDTH)
    if options is not None:
        shardit.parallelize(model, **options)
    found = []
    with torch.no_grad():
        for run in range(runs + 20):
            start = time.thread_time()
            model(x, by).numpy()
            if run >= 20:  # after the first call and the caches that it fills
                found.append(time.thread_time() - start)
    return statistics.median(found) * 1e6


def message_us(method: str, rank: int, count: int = 2000) -> float:
    """Return the CPU time of torch and gloo alone for one message: its send, its receive and the waits for both, as two
    ranks exchange one of a hop's size."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    sent, received = (torch.zeros(TOKENS * WIDTH * 4, dtype=torch.uint8) for _ in range(2))
    group, found = dist.group.WORLD, []
    assert group is not None
    for _ in range(count):
        start = time.thread_time()
        works = group.recv([received], 1 - rank, 0), group.send([sent], 1 - rank, 0)
        for work in works:
            work.wait()
        found.append(time.thread_time() - start)
    return statistics.median(found) * 1e6


def turn_us(count: int = 2000) -> float:
    """Return the CPU time of one turn of a program that only gives up its turns."""
    loop = RequestLoop(Schedule(0))

    def program() -> None:
        for _ in range(count):
            loop.yield_turn()

    start = time.thread_time()
    list(loop.run(iter([Program(program, seed) for seed in (1, 2)]), 2))
    return (time.thread_time() - start) / (2 * count) * 1e6


def measure(runs: int) -> dict[str, float]:
    """Return microseconds of each kind of step."""

    def on_two(kind: str, **options: Any) -> list[float]:
        with Ranks(2) as ranks:
            return ranks.call("host_us", kind, options, runs)

    with Ranks(1) as ranks:
        plain = {kind: ranks.call("host_us", kind, None, runs)[0] for kind in KINDS}
        turn = ranks.call("turn_us")[0]
    with Ranks(2) as ranks:
        message = statistics.mean(ranks.call("message_us"))
    most = BLOCKS - 1
    first, last = (on_two("scale", pipeline_parallel_size=2, layer_partition=cut) for cut in ([most, 1], [1, most]))
    block = plain["scale"] / BLOCKS
    own = (first[0] - last[0]) / (most - 1)
    placeholder = (first[1] - last[1]) / (most - 1) + own
    contiguous = on_two("scale", pipeline_parallel_size=2, pipeline_chunks=1)
    looped = on_two("scale", pipeline_parallel_size=2, pipeline_chunks=CHUNKS)
    passed = BLOCKS // 2 * (1 - 1 / CHUNKS)  # placeholders of the first rank, which leaves after its last chunk
    hop = (sum(looped) - sum(contiguous) - passed * placeholder) / (2 * CHUNKS - 2)
    return {
        "plain_block_us": block,
        "own_block_us": own - block,
        "placeholder_us": placeholder,
        "hop_us": hop,
        "message_us": message,
        "turn_us": turn,
        "exchange_us": (max(on_two("attend", ulysses_degree=2)) - plain["attend"]) / BLOCKS,
        "sum_us": (max(on_two("feed", tensor_parallel_size=2)) - plain["feed"]) / BLOCKS,
        "forward_2x8_us": max(looped) - plain["scale"] / 2,
    }
