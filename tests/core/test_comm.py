"""Messages between real ranks over gloo: memory that is still being sent, packing, timeouts, broadcasts."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.group import PACKET
from shardit.core.comm.mesh import Mesh, check_p2p, init_mesh, pick_device
from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import (
    ALIGN,
    dump_with_tensors,
    flat_bytes,
    load_with_tensors,
    pack_layout,
    storage_bytes,
    view_bytes,
)
from shardit.core.placement.assignment import Cut
from shardit.core.placement.partition import place_blocks
from shardit.core.runtime.pending import PendingTensor
from shardit.core.stages.transformer_stages import Runtime, stage
from shardit.errors import InputError, RankError, UnsupportedError
from tests.support.ranks import run_ranks

WIDTH = 256
ROWS = 1024  # 1 MB: gloo cannot take that into its own buffers, so a send is under way until the receiver takes it


def join(rank: int, count: int, method: str, timeout_s: float = 30) -> Mesh:
    config = DiffusionParallelConfig(pipeline_parallel_size=count)
    return init_mesh(config, device="cpu", timeout_s=timeout_s, rank=rank, init_method=method)


# Memory that is still being sent.


class Block(nn.Module):
    """Adds something to its input, in place or not."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.rest = nn.Parameter(torch.rand(8, WIDTH))  # blocks hold most of the parameters
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.scale) if self.in_place else x + self.scale


class Toy(nn.Module):
    """Six blocks; the code between and after them is given as functions that write in place."""

    def __init__(self, between: Callable[[torch.Tensor], None], after: Callable[[torch.Tensor], Any], in_place: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(6))
        self.between, self.after = between, after

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 1
        for block in self.blocks:
            x = block(x)
            self.between(x)
        return self.after(x)


def nothing(x: torch.Tensor) -> None: ...
def scale(x: torch.Tensor) -> None:
    x.mul_(1.25)


def zero_a_part(x: torch.Tensor) -> None:
    x[:, :7].zero_()


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x[:, :8]


TOYS = [
    (nothing, same, False),
    (scale, same, False),
    (nothing, scaled, True),
    (scale, scaled, True),
    (zero_a_part, twice, False),
    (zero_a_part, twice, True),
]


def overwritten(rank: int, count: int, method: str) -> int:
    """Each toy over the stages, several calls after each other; results are overwritten as soon as they are there."""
    mesh = join(rank, count, method)
    compared = 0
    for toy in TOYS:
        torch.manual_seed(0)
        model = Toy(*toy)
        inputs = [torch.rand(ROWS, WIDTH) for _ in range(3)]
        with torch.no_grad():
            expected = [model(x) for x in inputs]
        runtime = Runtime.of(mesh, split_batch=False)
        stage(model, runtime, Cut((), place_blocks([1.0] * 6, count, 2)))
        first, *others = inputs
        model(first)
        for slow in range(count):  # a rank that comes late to take what the others have sent
            outs = [model(x) for x in others]
            for number, out in enumerate(outs, 1):
                if rank == slow:
                    time.sleep(0.01)
                parts, wanted = (out, expected[number]) if isinstance(out, tuple) else ((out,), (expected[number],))
                for part, want in zip(parts, wanted, strict=True):
                    assert torch.equal(part, want), (toy, rank, number)
                    compared += 1
                for part in parts:
                    part.fill_(-1)
        held = [t.message.numel() for t in runtime.comm._outstanding if t.message is not None]
        assert not held or rank == count - 1  # only results, whose sender never learns that they were taken
        runtime.comm.flush()
    return compared


@pytest.mark.parametrize("count", [2, 3])
def test_memory_may_be_overwritten_while_it_is_sent(count: int) -> None:
    assert set(run_ranks(count, overwritten)) == {count * 2 * (4 + 2 * 2)}


def arguments_overwritten(rank: int, count: int, method: str) -> str:
    model = Toy(nothing, same, False)
    runtime = Runtime.of(join(rank, count, method, 5), split_batch=False)
    stage(model, runtime, Cut((), place_blocks([1.0] * 6, count, 2)))
    x = torch.rand(8, WIDTH)
    model(x)
    out = model(x)
    x.zero_()
    try:
        return f"went through: {out.sum()}"
    except RankError as error:
        return error.reason


def test_an_argument_must_not_be_overwritten_while_its_call_is_in_flight() -> None:
    assert "an argument was changed in place" in " ".join(run_ranks(2, arguments_overwritten))


def never_looked_at(rank: int, count: int, method: str) -> tuple[float, int]:
    torch.manual_seed(0)
    model = Toy(nothing, same, False)
    x = torch.rand(8, WIDTH)
    with torch.no_grad():
        expected = model(x)
    runtime = Runtime.of(join(rank, count, method), split_batch=False)
    stage(model, runtime, Cut((), place_blocks([1.0] * 6, count, 2)))
    model(x)
    for _ in range(70):  # more than Comm holds
        out = model(x)
        assert isinstance(out, PendingTensor)
        runtime.schedule.tick()
    out = model(x)
    # torch does not ask a tensor here, so nothing waits; what it gets must not look like a result.
    assert torch.as_tensor(out, dtype=torch.float64).isnan().all()
    assert torch.equal(out, expected)
    runtime.schedule.drain()
    runtime.comm.flush()
    return float(model(x).sum() - expected.sum()), len(runtime.schedule.active)


def test_unused_results_do_not_hang_later_calls() -> None:
    assert run_ranks(3, never_looked_at) == [(0.0, 0)] * 3


# Messages of their own.


def exchange(rank: int, count: int, method: str) -> dict[str, Any]:
    """Everything that `Comm` offers, once."""
    mesh = join(rank, count, method)
    comm = Comm(mesh.pipeline, max_outstanding=3)
    check_p2p(mesh)
    seen: dict[str, Any] = {"mixed": mixed_dtypes(comm), "many": many(comm)}
    head = len(pickle.dumps(b"x" * PACKET)) - PACKET
    blobs = [b"", b"x", bytes(range(256)) * 100, *(b"x" * (PACKET - head + more) for more in (-1, 0, 1, 9))]
    seen["blobs"] = [comm.group.broadcast_object(b if rank == count - 1 else b"ignored", count - 1) == b for b in blobs]
    seen["object"] = comm.group.broadcast_object({"from": rank, "x": [1, None]}, 1)
    seen["gathered"] = comm.group.gather_objects(f"rank {rank}")
    tensors = [torch.full((3, 2), float(rank)), torch.full((5,), rank, dtype=torch.int64), torch.empty(0)]
    for tensor in tensors:
        comm.broadcast(tensor, 1)
    seen["broadcast"] = [t.tolist() for t in tensors]
    comm.group.barrier()
    comm.flush()
    seen["held"] = len(comm._outstanding)
    seen["sent"] = comm.sent_bytes
    return seen


MIXED = (
    torch.arange(7, dtype=torch.uint8),
    torch.tensor([True, False, True]),
    torch.linspace(0, 1, 5, dtype=torch.float64),
    torch.linspace(-1, 1, 9).to(torch.bfloat16),
    torch.arange(12, dtype=torch.int64).reshape(3, 4),
    torch.complex(torch.arange(3.0), torch.ones(3)),
    torch.empty(0, 4),
    torch.tensor(2.5, dtype=torch.float16),
)


def mixed_dtypes(comm: Comm) -> bool:
    """One message with parts of all dtypes, round the ring."""
    layout = pack_layout(tuple(t.numel() * t.element_size() for t in MIXED))
    out = torch.zeros(layout.total, dtype=torch.uint8)
    for tensor, (offset, size) in zip(MIXED, layout.parts, strict=True):
        out[offset : offset + size].copy_(flat_bytes(tensor))
    inbox = torch.zeros_like(out)
    transfer = comm.receive(inbox, (comm.rank - 1) % comm.size)
    comm.send(out, (comm.rank + 1) % comm.size)
    comm.wait(transfer)
    comm.wait(transfer)
    parts = [
        view_bytes(inbox, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
        for tensor, (offset, _) in zip(MIXED, layout.parts, strict=True)
    ]
    return all(torch.equal(a, b) for a, b in zip(parts, MIXED, strict=True))


def many(comm: Comm) -> bool:
    """More messages at once than are held; only `Comm` has references to their buffers."""
    target, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    transfers = []
    for i in range(20):
        inbox = torch.empty(100_000, dtype=torch.uint8)
        transfers.append((comm.receive(inbox, source), inbox))
        comm.send(torch.full((100_000,), i, dtype=torch.uint8), target)
        assert len(comm._outstanding) <= 3
    for transfer, _ in transfers:
        comm.wait(transfer)
    return all(bool((inbox == i).all()) for i, (_, inbox) in enumerate(transfers))


def counts_ahead(rank: int, count: int, method: str) -> list[int]:
    """Numbers are sent ahead of a message that their receivers look at first."""
    comm = Comm(join(rank, count, method, timeout_s=10).pipeline, max_outstanding=1)
    numbers, box = [3, 0, 5], torch.zeros(1, dtype=torch.uint8)
    if rank == 0:
        for number in numbers:
            comm.send_count(number)
        for target in range(1, count):
            comm.send(box, target)
        comm.flush()
        return numbers
    comm.wait(comm.receive(box, 0))
    return [comm.receive_count() for _ in numbers]


def test_counts_are_sent_without_waiting() -> None:
    assert run_ranks(3, counts_ahead) == [[3, 0, 5]] * 3


@pytest.mark.parametrize("count", [2, 3])
def test_messages(count: int) -> None:
    for seen in run_ranks(count, exchange):
        assert seen["mixed"]
        assert seen["many"]
        assert seen["blobs"] == [True] * 7
        assert seen["object"] == {"from": 1, "x": [1, None]}
        assert seen["gathered"] == [f"rank {r}" for r in range(count)]
        assert seen["broadcast"] == [[[1.0, 1.0]] * 3, [1] * 5, []]
        assert seen["held"] == 0
        assert seen["sent"] > 20 * 100_000


BOUND_S = 2.0


def waits_in_vain(rank: int, count: int, method: str) -> list[Any]:
    """Rank 0 waits for a message that no rank sends, while rank 1 lives; then sends one that no rank receives."""
    comm = Comm(join(rank, count, method, BOUND_S).pipeline)
    if rank != 0:
        time.sleep(2 * BOUND_S + 1)
        return []
    out = []
    for act in (
        lambda: comm.wait(comm.receive(torch.empty(8, dtype=torch.uint8), 1)),
        lambda: (comm.send(torch.empty(1 << 22, dtype=torch.uint8), 1), comm.flush()),
    ):
        begin = time.monotonic()
        try:
            act()
            out.append("went through")
        except RankError as error:
            out.append((error.rank, error.reason, time.monotonic() - begin))
    return out


def test_every_wait_is_bounded() -> None:
    for ended in run_ranks(2, waits_in_vain)[0]:
        rank, reason, seconds = ended
        assert rank == 0
        assert reason.startswith("communication failed (")
        assert seconds < BOUND_S + 1


def peer_dies(rank: int, count: int, method: str) -> str:
    comm = Comm(join(rank, count, method, 20).pipeline)
    if rank == 1:
        return "gone"
    try:
        comm.wait(comm.receive(torch.empty(8, dtype=torch.uint8), 1))
    except RankError as error:
        return error.reason
    return "went through"


def test_exit_of_a_peer_ends_the_wait() -> None:
    begin = time.monotonic()
    answer = run_ranks(2, peer_dies)
    assert answer[0].startswith("communication failed (receive from stage 1)")
    assert time.monotonic() - begin < 15


# Without ranks.


def test_pack_layout() -> None:
    assert pack_layout(()) == pack_layout((0,)) or pack_layout(()).total == 0
    assert pack_layout((5,)).parts == ((0, 5),)
    assert pack_layout((5,)).total == 5
    layout = pack_layout((5, ALIGN, 0, ALIGN + 1))
    assert [offset % ALIGN for offset, _ in layout.parts] == [0] * 4
    assert layout.parts == ((0, 5), (ALIGN, ALIGN), (2 * ALIGN, 0), (2 * ALIGN, ALIGN + 1))
    assert layout.total == 4 * ALIGN


def test_bytes_share_memory() -> None:
    base = torch.arange(10.0)
    part = flat_bytes(base[2:5])
    assert part.tolist() == base[2:5].clone().view(torch.uint8).tolist()
    part.zero_()
    assert base.tolist() == [0, 1, 0, 0, 0, 5, 6, 7, 8, 9]
    assert storage_bytes(base[4:], 0, 8).data_ptr() == base.data_ptr()
    strided = view_bytes(storage_bytes(base, 0, 40), 4, torch.float32, (3,), (3,))
    assert strided.tolist() == [1, 0, 7]


class Distribution:
    """Like diffusers' DiagonalGaussianDistribution: tensors in the attributes of an object, some of them views."""

    def __init__(self, parameters: torch.Tensor):
        self.parameters = parameters
        self.mean, self.logvar = torch.chunk(parameters, 2, dim=1)
        self.std = torch.exp(0.5 * self.logvar)
        self.deterministic = False
        self.again = {"same": self.std}


def test_objects_with_tensors_inside() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    for make in (Distribution, DiagonalGaussianDistribution):
        value = make(torch.rand(2, 4, 3, 3))
        data, tensors = dump_with_tensors((value, [value.mean]))
        assert all(isinstance(t, torch.Tensor) for t in tensors)
        assert len(data) < 2000
        assert len({id(t) for t in tensors}) == len(tensors)  # each once, however often it is met
        got, (mean,) = load_with_tensors(data, [t.clone() for t in tensors])
        assert type(got) is make
        assert got.mean is mean
        assert torch.equal(got.mean, value.mean)
        assert torch.equal(got.std, value.std)
        assert got.deterministic is value.deterministic
        if make is DiagonalGaussianDistribution:
            assert torch.equal(got.mode(), value.mode())
        else:
            assert got.again["same"] is got.std


def test_unsupported_devices_are_refused(monkeypatch) -> None:
    assert pick_device("cpu", 3) == torch.device("cpu")
    for kind in ("mps", "xpu", "meta"):
        with pytest.raises(UnsupportedError, match=f"'{kind}' is not supported.*SHARDIT_ALLOW_DEVICE={kind}"):
            pick_device(kind, 0)
    monkeypatch.setenv("SHARDIT_ALLOW_DEVICE", "xpu,mps")
    with pytest.raises(UnsupportedError, match="'meta'"):
        pick_device("meta", 0)
    monkeypatch.setenv("SHARDIT_ALLOW_DEVICE", "xpu,foo")
    with pytest.raises(InputError, match="SHARDIT_ALLOW_DEVICE names 'foo', which this torch does not know"):
        pick_device(None, 0)
    monkeypatch.delenv("SHARDIT_ALLOW_DEVICE")
    for kind in ("gpu", "cuda:x", "cuda:", ""):
        with pytest.raises(InputError, match="device"):
            pick_device(kind, 0)
